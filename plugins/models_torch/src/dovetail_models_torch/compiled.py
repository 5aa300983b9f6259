"""A decoder's forward pass as operations of a compiled step (interfaces/compiled.py).

`Decoder.forward` is the readable form of the same arithmetic, and the reference in tests. What
differs: rotated queries and keys are rounded once instead of twice, and sums may be added in
another order.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.compiled import (
    AttentionCall,
    Compiled,
    CompiledAttention,
    CompiledEmbedding,
    CompiledForward,
    CompiledLinear,
    Op,
)
from dovetail.native import zeros
from dovetail_models_torch.config import DecoderConfig
from dovetail_models_torch.layer import DecoderLayer
from dovetail_models_torch.native import (
    ACTIVATIONS,
    TYPES,
    AnglesOp,
    GateOp,
    NormOp,
    OperationLibrary,
    RotateOp,
)

DEPTH_UNIT = 32
"""Rows of an input of a linear layer are zero from their end to a multiple of it."""


class CompiledDecoder:
    """The buffers and operations of one decoder."""

    def __init__(
        self,
        library: OperationLibrary,
        config: DecoderConfig,
        embedding: CompiledEmbedding,
        layers: Sequence[DecoderLayer],
        attention_layers: Sequence[AttentionLayer],
        norm: Tensor,
        max_num_tokens: int,
    ) -> None:
        self._library, self._config, self._layers = library, config, layers
        self._embedding, self._norm, self._dtype = embedding, norm, norm.dtype
        self._attention_layers = attention_layers
        c, n = config, max_num_tokens
        num_heads = c.num_heads + 2 * c.num_kv_heads

        def buffer(size: int) -> Tensor:
            return _lazy_zeros(n, -(-size // DEPTH_UNIT) * DEPTH_UNIT, dtype=self._dtype)

        self._hidden, self._x, self._delta = (buffer(c.hidden_size) for _ in range(3))
        self._qkv, self._seen = buffer(num_heads * c.head_size), buffer(c.num_heads * c.head_size)
        self._gate_up, self._gated = buffer(2 * c.intermediate_size), buffer(c.intermediate_size)
        self._angles = _lazy_zeros(n, c.head_size, dtype=torch.float32)
        self._inv_freq = c.inv_freq.contiguous()

    def forward(
        self, backends: Sequence[CompiledAttention], caches: Sequence[Any]
    ) -> CompiledForward:
        operations = list(self._operations(backends, caches))
        ops: list[Op] = [op for compiled in operations for op in compiled.ops]
        return CompiledForward(
            Compiled(ops, (self, [compiled.keep for compiled in operations])),
            self._x[:, : self._config.hidden_size],
            self._num_weights(),
        )

    def _num_weights(self) -> int:
        """Of the linear layers of all layers."""
        c, heads = self._config, self._config.num_heads
        attention = (2 * heads + 2 * c.num_kv_heads) * c.head_size * c.hidden_size
        return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    def _op(self, kind: str, arguments: ctypes.Structure, *tensors: Tensor) -> Compiled:
        return Compiled([self._library.op(kind, arguments)], (arguments, tensors))

    def _operations(
        self, backends: Sequence[CompiledAttention], caches: Sequence[Any]
    ) -> Iterator[Compiled]:
        c, layers = self._config, self._layers
        yield self._embedding.compile_rows(self._hidden)
        yield self._op(
            "angles",
            AnglesOp(
                self._inv_freq.data_ptr(),
                self._angles.data_ptr(),
                c.rope_scale,
                c.head_size // 2,
                TYPES[self._dtype],
            ),
        )
        norms = [*(layer.input_norm for layer in layers), self._norm]
        yield self._normed(None, norms[0])
        for layer, following in zip(layers, norms[1:], strict=True):
            yield from self._layer(layer, backends[layer.index], caches[layer.index])
            yield self._normed(self._delta, following)

    def _layer(
        self, layer: DecoderLayer, backend: CompiledAttention, cache: Any
    ) -> Iterator[Compiled]:
        c, kind = self._config, TYPES[self._dtype]
        qkv_proj, o_proj, gate_up_proj, down_proj = cast(Sequence[CompiledLinear], layer.linears)
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
        yield backend.compile(self._attention_layers[layer.index], cache, call)
        yield o_proj.compile(self._seen, self._delta)
        yield self._normed(self._delta, layer.post_attention_norm)
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

    def _normed(self, delta: Tensor | None, weight: Tensor) -> Compiled:
        """hidden += delta; x = norm(hidden)."""
        c, stride = self._config, self._hidden.stride(0)
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


def _lazy_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory before they are touched."""
    count = math.prod(shape)
    return torch.frombuffer(zeros(count * dtype.itemsize), dtype=dtype, count=count).view(shape)
