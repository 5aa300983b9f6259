"""A decoder whose forward pass is one call: its operations, the attention backend's among them, in
a list (csrc/step.cpp).

`Decoder.forward` is the readable form of the same arithmetic, and the reference in tests. What
differs: rotated queries and keys are rounded once instead of twice, and sums may be added in
another order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dovetail.interfaces.architecture import Target
from dovetail.interfaces.compiled import AttentionCall, Compiled, CompiledAttention, Op, StepHeader
from dovetail_worker_torch.decoder import Decoder, DecoderLayer
from dovetail_worker_torch.model import StepAttend
from dovetail_worker_torch.native import (
    ACTIVATIONS,
    TYPES,
    EmbedOp,
    GateOp,
    Kernels,
    NormOp,
    RotateOp,
)
from dovetail_worker_torch.packed import PackedLinear, lazy_zeros, padded

LONG_STEP = 1 << 28
"""Multiply-adds above which a step lets go of Python's lock."""


class CompiledDecoder:
    """A `Model` over a `Decoder` with packed weights. `bind` comes before `forward`; one step at a
    time."""

    def __init__(self, decoder: Decoder, kernels: Kernels, max_num_tokens: int) -> None:
        self.decoder, self.kernels = decoder, kernels
        self.attention_layers = decoder.attention_layers
        self.vocab_size = decoder.vocab_size
        self._dtype = decoder.norm.dtype
        self._max_num_tokens = max_num_tokens
        self._num_weights = sum(
            layer.in_features * layer.out_features
            for d in decoder.layers
            for layer in cast(list[PackedLinear], d.linears)
        )
        self._keep: list[Any] = []
        self._program: Program | None = None
        self._step = StepHeader()

    def bind(self, backends: Sequence[Any], caches: Sequence[Any]) -> None:
        """Make the buffers and the program; `backends` (each a `CompiledAttention`) and `caches` by
        layer."""
        c, n = self.decoder.config, self._max_num_tokens
        qkv_heads = c.num_heads + 2 * c.num_kv_heads

        def buffer(size: int, dtype: torch.dtype = self._dtype) -> Tensor:
            return lazy_zeros(n, padded(size), dtype=dtype)

        self._hidden, self._x, self._delta = (buffer(c.hidden_size) for _ in range(3))
        self._qkv, self._seen = buffer(qkv_heads * c.head_size), buffer(c.num_heads * c.head_size)
        self._gate_up, self._gated = buffer(2 * c.intermediate_size), buffer(c.intermediate_size)
        self._angles = lazy_zeros(n, c.head_size, dtype=torch.float32)
        self._inv_freq = c.inv_freq.contiguous()
        self._keep = []
        ops = [op for compiled in self._operations(backends, caches) for op in self._kept(compiled)]
        self._program = Program(self.kernels, ops)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: StepAttend) -> Tensor:
        assert self._program is not None
        num_tokens = len(token_ids)
        if num_tokens > self._max_num_tokens:
            raise ValueError(
                f"a step of {num_tokens} tokens: more than max_num_batched_tokens"
                f" {self._max_num_tokens}"
            )
        step = self._step
        step.num_tokens, step.num_threads = num_tokens, torch.get_num_threads()
        step.token_ids, step.positions = token_ids.data_ptr(), positions.data_ptr()
        addresses = attend.addresses()
        self._addresses = (ctypes.c_uint64 * len(addresses))(*addresses)
        step.attention = ctypes.addressof(self._addresses)
        self._program.run(step, hold=num_tokens * self._num_weights < LONG_STEP)
        return self._x[:num_tokens, : self.decoder.config.hidden_size]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)

    def targets(self) -> dict[str, Target]:
        return self.decoder.targets()

    def unused(self) -> list[str]:
        return self.decoder.unused()

    def _kept(self, compiled: Compiled) -> list[Op]:
        self._keep.append(compiled.keep)
        return compiled.ops

    def _op(self, kind: str, arguments: ctypes.Structure, *tensors: Tensor) -> Compiled:
        return Compiled([self.kernels.op(kind, arguments)], (arguments, tensors))

    def _operations(
        self, backends: Sequence[CompiledAttention], caches: Sequence[Any]
    ) -> Iterator[Compiled]:
        d, c = self.decoder, self.decoder.config
        embedding = cast(PackedLinear, d.embedding)
        yield self._op(
            "embed",
            EmbedOp(
                embedding.address,
                self._hidden.data_ptr(),
                self._hidden.stride(0),
                self._inv_freq.data_ptr(),
                self._angles.data_ptr(),
                c.rope_scale,
                c.head_size // 2,
            ),
        )
        yield self._norm(None, d.layers[0].input_norm if d.layers else d.norm)
        for layer, following in zip(
            d.layers, [*(after.input_norm for after in d.layers[1:]), d.norm], strict=True
        ):
            yield from self._layer(layer, backends[layer.index], caches[layer.index])
            yield self._norm(self._delta, following)

    def _layer(
        self, layer: DecoderLayer, backend: CompiledAttention, cache: Any
    ) -> Iterator[Compiled]:
        c, kind = self.decoder.config, TYPES[self._dtype]
        qkv_proj, o_proj, gate_up_proj, down_proj = cast(list[PackedLinear], layer.linears)
        qkv, stride, size = (
            self._qkv.data_ptr(),
            self._qkv.stride(0),
            self._qkv.element_size() * c.head_size,
        )
        yield qkv_proj.compile(self._x, self._qkv)
        norm = None if layer.qk_norm is None else layer.qk_norm.data_ptr()
        yield self._op(
            "rotate",
            RotateOp(
                qkv,
                stride,
                norm,
                self._angles.data_ptr(),
                layer.num_qk_heads,
                c.head_size,
                c.norm_eps,
                kind,
            ),
        )
        k, v = qkv + c.num_heads * size, qkv + layer.num_qk_heads * size
        call = AttentionCall(
            qkv, k, v, self._seen.data_ptr(), stride, stride, stride, self._seen.stride(0), kind
        )
        yield backend.compile(self.attention_layers[layer.index], cache, call)
        yield o_proj.compile(self._seen, self._delta)
        yield self._norm(self._delta, layer.post_attention_norm)
        yield gate_up_proj.compile(self._x, self._gate_up)
        yield self._op(
            "gate",
            GateOp(
                self._gate_up.data_ptr(),
                self._gated.data_ptr(),
                self._gate_up.stride(0),
                self._gated.stride(0),
                c.intermediate_size,
                ACTIVATIONS[c.activation],
                kind,
            ),
        )
        yield down_proj.compile(self._gated, self._delta)

    def _norm(self, delta: Tensor | None, weight: Tensor) -> Compiled:
        """hidden += delta; x = norm(hidden)."""
        c, stride = self.decoder.config, self._hidden.stride(0)
        filled = torch.zeros(stride, dtype=self._dtype)
        filled[: c.hidden_size] = weight
        return self._op(
            "norm",
            NormOp(
                self._hidden.data_ptr(),
                None if delta is None else delta.data_ptr(),
                self._x.data_ptr(),
                filled.data_ptr(),
                stride,
                c.hidden_size,
                c.norm_eps,
                TYPES[self._dtype],
            ),
            filled,
        )


class Program:
    """A list of operations that run in one call."""

    def __init__(self, kernels: Kernels, ops: list[Op]) -> None:
        self._kernels = kernels
        self._pointer = kernels.holding.dovetail_new_program((Op * len(ops))(*ops), len(ops))

    def run(self, step: StepHeader, *, hold: bool) -> None:
        """`hold` keeps Python's lock."""
        functions = self._kernels.holding if hold else self._kernels.functions
        functions.dovetail_run_program(
            self._pointer, ctypes.addressof(step), None, self._kernels.team
        )

    def __del__(self) -> None:
        self._kernels.holding.dovetail_free_program(self._pointer)
