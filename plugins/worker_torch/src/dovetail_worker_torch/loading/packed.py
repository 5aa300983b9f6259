"""Linear layers of the compiled kernels: weights packed while they are read (csrc/linear.h),
float32 or bfloat16, on a CPU."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.interfaces.architecture import Embedding, Linear, Target
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.compiled import Compiled
from dovetail.interfaces.quantization import Part
from dovetail.native import zeros
from dovetail_worker_torch.native import (
    TYPES,
    EmbedOp,
    Kernels,
    LinearCall,
    LinearOp,
    LinearStruct,
)

DEPTH_UNIT = 32
"""Rows of an input are zero from their end to a multiple of it."""
PANEL = 64


def padded(size: int, unit: int = DEPTH_UNIT) -> int:
    return -(-size // unit) * unit


def lazy_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory before they are touched."""
    count = math.prod(shape)
    return torch.frombuffer(zeros(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


class PackedLinear:
    """`x @ weight.T + bias`. An output does not depend on how many rows there are: batch
    invariant."""

    def __init__(
        self,
        kernels: Kernels,
        parts: Sequence[Part],
        in_features: int,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        self.parts, self.in_features, self.dtype = parts, in_features, dtype
        self.out_features = sum(part.out_features for part in parts)
        self._kernels = kernels
        self._struct = LinearStruct(TYPES[dtype], self.out_features, in_features, None, None)
        self._address = ctypes.addressof(self._struct)
        # What fills up the last panel stays zero.
        self._weight = lazy_zeros(
            kernels.holding.dovetail_weight_bytes(self._address), dtype=torch.uint8
        )
        self._struct.weight = self._weight.data_ptr()
        self._bias = torch.zeros(padded(self.out_features, PANEL)) if bias else None
        if self._bias is not None:
            self._struct.bias = self._bias.data_ptr()

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if self.in_features % DEPTH_UNIT:
            x = F.pad(x, (0, -self.in_features % DEPTH_UNIT))
        elif x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty(x.shape[0], self.out_features, dtype=dtype or x.dtype)
        call = LinearCall(
            x.data_ptr(), out.data_ptr(), x.stride(0), out.stride(0), TYPES[out.dtype]
        )
        self._kernels.functions.dovetail_linear(
            self._address,
            ctypes.addressof(call),
            x.shape[0],
            torch.get_num_threads(),
            self._kernels.team,
        )
        return out

    def rows(self, token_ids: Tensor) -> Tensor:
        out = torch.empty(len(token_ids), self.in_features, dtype=self.dtype)
        row_bytes = self.in_features * self.dtype.itemsize
        self._kernels.functions.dovetail_unpack_rows(
            self._address, token_ids.data_ptr(), len(token_ids), out.data_ptr(), row_bytes
        )
        return out

    def targets(self) -> dict[str, Target]:
        found, start = {}, 0
        for part in self.parts:
            shape = (part.out_features, self.in_features)
            found[f"{part.name}.weight"] = Target(shape, self.dtype, partial(self._pack, start))
            if self._bias is not None:
                found[f"{part.name}.bias"] = Target.into(
                    self._bias[start : start + part.out_features]
                )
            start += part.out_features
        return found

    def compile(self, x: Tensor, y: Tensor) -> Compiled:
        """The operation `y[:T] = self(x[:T])` on buffers of a compiled step; x's rows are zero
        behind `in_features`."""
        call = LinearCall(x.data_ptr(), y.data_ptr(), x.stride(0), y.stride(0), TYPES[y.dtype])
        arguments = LinearOp(self._address, call)
        return Compiled([self._kernels.op("linear", arguments)], (self, arguments, x, y))

    def compile_rows(self, hidden: Tensor) -> Compiled:
        """The operation `hidden[:T] = self.rows(token_ids)` on a buffer of a compiled step."""
        arguments = EmbedOp(self._address, hidden.data_ptr(), hidden.stride(0))
        return Compiled([self._kernels.op("embed", arguments)], (self, arguments, hidden))

    def _pack(self, start: int, tensor: Tensor) -> None:
        rows = tensor.to(self.dtype).contiguous()
        self._kernels.functions.dovetail_pack(
            self._address, rows.data_ptr(), rows.stride(0), start, rows.shape[0]
        )


class PackedLinears:
    """Makes a model's layers of packed weights."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        self._kernels, self._dtype = kernels, dtype

    def linear(
        self, name: str, parts: Sequence[Part], in_features: int, bias: bool
    ) -> PackedLinear:
        return PackedLinear(self._kernels, parts, in_features, bias, self._dtype)

    def embedding(self, name: str, vocab_size: int, size: int) -> PackedLinear:
        return self.linear(name, [Part(name, vocab_size)], size, False)

    def tied(self, name: str, embedding: Embedding, of: str, vocab_size: int, size: int) -> Linear:
        return embedding

    def attention(self, name: str, layer: AttentionLayer) -> AttentionLayer:
        return layer
