"""Implement the matmul contract with the compiled kernels: pass tensors as pointers, and manage the
memory of prepared rows."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.facts import DeviceFacts
from dovetail.interfaces.compiled import Compiled, Op
from dovetail.interfaces.matmul import WeightFormat
from dovetail.interfaces.quantization import LinearLayer
from dovetail.native import build_library, openmp_of, zeros

SOURCES = Path(__file__).parent / "csrc"
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
CODES = {"int8": 0, "uint4": 1, "float8_e4m3fn": 2}
INPUTS = {None: 0, "int8": 1, "float8_e4m3fn": 2}
ZERO = {"int8": 128, "uint4": 8, "float8_e4m3fn": 0}
"""The code of the value 0. int8 codes are stored unsigned, with an offset of 128, because the
product takes unsigned weights."""
PANEL, UNIT = 64, 8
"""kPanel of dovetail/panels.h and kUnit of matmul.h."""

_p, _i, _n, _f = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class WeightStruct(ctypes.Structure):
    _fields_ = [
        ("codes", _i),
        ("inputs", _i),
        ("type", _i),
        ("has_groups", _i),
        ("num_outputs", _n),
        ("depth", _n),
        ("chunk", _n),
        ("packed", _p),
        ("scales", _p),
        ("zeros", _p),
        ("bias", _p),
        ("order", _p),
        ("input_scale", _f),
        ("zero", _i),
    ]


class CallStruct(ctypes.Structure):
    _fields_ = [("x", _p), ("y", _p), ("x_stride", _n), ("y_stride", _n), ("rows", _p)]


class OperationStruct(ctypes.Structure):
    _fields_ = [("weight", _p), ("call", CallStruct)]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "dovetail_packed_bytes": (_n, [_p]),
    "dovetail_row_bytes": (_n, [_p]),
    "dovetail_pack": (None, [_p, _p]),
    "dovetail_multiply": (None, [_p, _p, _i, _i]),
    "dovetail_ops": (None, [_p, _p]),
}


class CpuMatmul:
    """A `Matmul`. The prepared rows of all its layers share memory, because layers are computed one
    after the other."""

    def __init__(self, facts: DeviceFacts) -> None:
        path = build_library("matmul-cpu", SOURCES, facts, openmp=openmp_of("torch"))
        self.functions = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = result, arguments
        self._rows: dict[int, Any] = {}
        """Buffers for the prepared rows of compiled steps, by size. Their addresses do not
        change."""

    def linear(
        self, format: WeightFormat, layer: LinearLayer, tensors: Mapping[str, Tensor]
    ) -> CpuLinear:
        return CpuLinear(self, format, layer, tensors)

    def nbytes(self, format: WeightFormat, layer: LinearLayer) -> int:
        chunk = _chunk(format, layer)
        num_chunks = -(-layer.in_features // chunk)
        depth, width = (
            num_chunks * -(-chunk // UNIT) * UNIT,
            -(-layer.out_features // PANEL) * PANEL,
        )
        scales = format.num_groups(layer.in_features) * width * (5 if format.zeros else 4)
        return (
            depth * width * format.bits // 8
            + scales
            + (layer.in_features * 8 if format.order else 0)
        )

    def rows(self, num_bytes: int) -> int:
        """Return the address of memory for prepared rows. Its content is valid during one product
        only. The memory is not touched before it is used."""
        have = next((size for size in self._rows if size >= num_bytes), None)
        if have is None:
            tensor = torch.frombuffer(zeros(num_bytes + 64), dtype=torch.uint8)
            self._rows[num_bytes], have = tensor, num_bytes
        address: int = self._rows[have].data_ptr()
        return address


class CpuLinear:
    """A `CompiledLinear`. It is batch invariant: an output does not depend on the number of
    rows."""

    def __init__(
        self,
        matmul: CpuMatmul,
        format: WeightFormat,
        layer: LinearLayer,
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._matmul, self._functions = matmul, matmul.functions
        self.out_features = layer.out_features
        self._dtype = getattr(torch, layer.dtype)
        chunk = _chunk(format, layer)
        self._struct = WeightStruct(
            CODES[format.codes],
            INPUTS[format.inputs],
            TYPES[layer.dtype],
            format.group_size is not None,
            layer.out_features,
            layer.in_features,
            chunk,
            zero=ZERO[format.codes],
        )
        self._address = ctypes.addressof(self._struct)
        self._kept = {
            "packed": torch.frombuffer(
                zeros(self._functions.dovetail_packed_bytes(self._address)), dtype=torch.uint8
            ),
            "scales": self._wide(tensors["scales"].float().T),
        }
        if format.zeros:
            shift = 128 if format.codes == "int8" else 0  # the same offset as the codes
            self._kept["zeros"] = self._wide(
                (tensors["zeros"].T.to(torch.int16) + shift).to(torch.uint8)
            )
        if layer.bias:
            self._kept["bias"] = self._wide(tensors["bias"].float()[None])
        if format.order:
            self._kept["order"] = tensors["order"].to(torch.int64).contiguous()
        if format.input_scale:
            self._struct.input_scale = float(tensors["input_scale"])
        for name, tensor in self._kept.items():
            setattr(self._struct, name, tensor.data_ptr())
        codes = tensors["codes"].contiguous()
        self._functions.dovetail_pack(self._address, codes.data_ptr())
        self._row_bytes: int = self._functions.dovetail_row_bytes(self._address)

    def _wide(self, rows: Tensor) -> Tensor:
        """Convert `[n, out]` to `[panels, n, PANEL]`, padded with zeros, so that the data of a
        panel is contiguous."""
        wide = torch.zeros(len(rows), -(-self.out_features // PANEL) * PANEL, dtype=rows.dtype)
        wide[:, : self.out_features] = rows
        return wide.view(len(rows), -1, PANEL).transpose(0, 1).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty(len(x), self.out_features, dtype=self._dtype)
        rows = torch.empty(len(x) * self._row_bytes + 64, dtype=torch.uint8)
        call = CallStruct(
            x.data_ptr(), out.data_ptr(), x.stride(0), out.stride(0), _aligned(rows.data_ptr())
        )
        self._functions.dovetail_multiply(
            self._address, ctypes.addressof(call), len(x), torch.get_num_threads()
        )
        return out

    def compile(self, x: Tensor, y: Tensor) -> Compiled:
        rows = self._matmul.rows(len(x) * self._row_bytes)
        call = CallStruct(x.data_ptr(), y.data_ptr(), x.stride(0), y.stride(0), _aligned(rows))
        operation, ops = OperationStruct(self._address, call), (Op * 2)()
        self._functions.dovetail_ops(ctypes.addressof(operation), ctypes.addressof(ops))
        return Compiled(list(ops), (self, operation, ops, x, y))


def _chunk(format: WeightFormat, layer: LinearLayer) -> int:
    """Return the number of inputs that are accumulated before their sum is scaled. Longer chunks
    are faster. The limits keep a dequantized chunk in the L1 cache and integer sums within 32
    bits."""
    if format.group_size is not None:
        return min(format.group_size, layer.in_features)
    count = -(-layer.in_features // (2048 if format.inputs == "int8" else 256))
    # All chunks have about the same size.
    return min(-(-layer.in_features // (count * UNIT)) * UNIT, layer.in_features)


def _aligned(address: int) -> int:
    return -(-address // 64) * 64
