"""For tests of models: attention that is slow and obviously right, also as an operation of compiled
steps."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.facts import device_facts, read_json
from dovetail.interfaces.architecture import LayerMaker, Model
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.compiled import AttentionCall, Compiled, Op, StepHeader
from dovetail.interfaces.worker import Progress
from dovetail_models_torch import ARCHITECTURES
from dovetail_models_torch.decoder import Decoder, DecoderArchitecture
from dovetail_worker_torch.loading.linear import TorchLinears
from dovetail_worker_torch.loading.model import load_model
from dovetail_worker_torch.loading.packed import PackedLinears
from dovetail_worker_torch.native import Kernels
from dovetail_worker_torch.runner import compiled

CPU = torch.device("cpu")


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    layers: LayerMaker | None = None,
    progress: Progress = lambda *_: None,
    torch_compile: bool = False,
) -> Model:
    """With the architecture that `auto` would take, and by default with layers of plain torch."""
    layers = layers or TorchLinears(dtype, CPU)
    if read_json(folder / "config.json").get("architectures", [None])[:1] in [
        [name] for name in ARCHITECTURES
    ]:
        return load_model(
            folder, DecoderArchitecture(), layers, dtype=dtype, device=CPU, progress=progress
        )
    from dovetail_models_transformers.bridge import BridgeArchitecture

    bridge = BridgeArchitecture(trust_remote_code=False)
    return load_model(
        folder,
        bridge,
        layers,
        dtype=dtype,
        device=CPU,
        progress=progress,
        loads_weights=True,
        compiled=torch_compile,
    )


class DenseAttention:
    """Attention that is slow and obviously right: every sequence's keys and values in a list,
    softmax spelled out."""

    def __init__(self, layers: list[AttentionLayer]) -> None:
        self.layers = layers
        self.keys: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self.values: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self.rows: list[tuple[int, int]] = []
        """(sequence, number of tokens) of the step, in the order of the batch."""

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer = self.layers[index]
        num_tokens = sum(count for _, count in self.rows)
        assert layer.index == index
        assert q.shape == (num_tokens, layer.num_heads, layer.head_size)
        assert k.shape == v.shape == (num_tokens, layer.num_kv_heads, layer.head_size)
        assert q.is_contiguous()
        assert k.is_contiguous()
        assert v.is_contiguous()
        out, start = torch.full_like(q, torch.nan), 0
        for sequence, count in self.rows:
            rows = slice(start, start := start + count)
            self.keys[index, sequence].extend(k[rows].clone())
            self.values[index, sequence].extend(v[rows].clone())
            out[rows] = self._attend(layer, sequence, q[rows])
        return out

    def _attend(self, layer: AttentionLayer, sequence: int, q: Tensor) -> Tensor:
        group = layer.num_heads // layer.num_kv_heads
        k = torch.stack(self.keys[layer.index, sequence]).repeat_interleave(group, 1)
        v = torch.stack(self.values[layer.index, sequence]).repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", q, k) * layer.scale
        if layer.logit_soft_cap is not None:
            logits = layer.logit_soft_cap * torch.tanh(logits / layer.logit_soft_cap)
        key_position = torch.arange(len(k))
        distance = (len(k) - len(q) + torch.arange(len(q)))[:, None] - key_position
        visible = (distance >= 0) & (distance < (layer.window or len(k)))
        logits = logits.masked_fill(~visible, -torch.inf)
        if layer.sinks is not None:
            assert layer.sinks.dtype == torch.float32
            assert layer.sinks.shape == (layer.num_heads,)
            logits = torch.cat((logits, layer.sinks[:, None, None].expand(-1, len(q), 1)), -1)
        return torch.einsum("hqk,khd->qhd", logits.softmax(-1)[..., : len(k)], v)


class CalledAttention:
    """A `CompiledAttention` of one operation, which calls a `DenseAttention` back. For one
    thread."""

    OPERATION = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.POINTER(StepHeader), ctypes.c_int32, ctypes.c_int32
    )
    PIECES = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(StepHeader))

    def __init__(self) -> None:
        self.attention: DenseAttention | None = None
        self.errors: list[Exception] = []

    def compile(self, layer: AttentionLayer, cache: object, call: AttentionCall) -> Compiled:
        dtype = {0: torch.float32, 1: torch.bfloat16}[call.type]

        def view(address: int, stride: int, count: int, heads: int) -> Tensor:
            length = (count - 1) * stride + heads * layer.head_size
            memory = (ctypes.c_char * (length * dtype.itemsize)).from_address(address)
            shape = (count, heads, layer.head_size)
            return torch.frombuffer(memory, dtype=dtype).as_strided(
                shape, (stride, layer.head_size, 1)
            )

        def attend(_: object, step: Any, piece: int, thread: int) -> None:
            n = step.contents.num_tokens
            q = view(call.q, call.q_stride, n, layer.num_heads)
            k = view(call.k, call.k_stride, n, layer.num_kv_heads)
            v = view(call.v, call.v_stride, n, layer.num_kv_heads)
            try:
                assert self.attention is not None
                out = self.attention(layer.index, q.contiguous(), k.contiguous(), v.contiguous())
                view(call.out, call.out_stride, n, layer.num_heads).copy_(out)
            except Exception as e:  # cannot pass through C
                self.errors.append(e)

        piece, pieces = self.OPERATION(attend), self.PIECES(lambda *_: 1)
        addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in (pieces, piece)]
        return Compiled([Op(*addresses, None)], (piece, pieces, call))

    def address(self, layer: AttentionLayer, plan: object) -> int:
        raise AssertionError("asked by the runner only")


class CompiledModel:
    """A compiled decoder behind the dense attention that it is given."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        kernels = Kernels.load(device_facts(), own_threads=True)
        decoder = load(folder, dtype, PackedLinears(kernels, dtype))
        assert isinstance(decoder, Decoder)
        self.model = compiled.CompiledModel(decoder, kernels, 32)
        self.backend = CalledAttention()
        self.attention_layers, self.vocab_size = decoder.attention_layers, decoder.vocab_size
        self.model.bind(
            [self.backend] * len(self.attention_layers), [None] * len(self.attention_layers)
        )

    def forward(self, token_ids: Tensor, positions: Tensor, attention: DenseAttention) -> Tensor:
        self.backend.attention = attention
        attention.addresses = lambda: [0] * len(self.attention_layers)
        hidden = self.model.forward(token_ids, positions, attention)
        assert not self.backend.errors, self.backend.errors
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)
