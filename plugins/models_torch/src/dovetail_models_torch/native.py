"""The C++ operations of a decoder (csrc/ops.cpp) behind ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from dovetail.facts import DeviceFacts
from dovetail.interfaces.compiled import Op
from dovetail.native import build_library, openmp_of

SOURCES = Path(__file__).parent / "csrc"
TYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
KINDS = ("angles", "norm", "rotate", "gate")

_p, _i, _n, _f = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class AnglesOp(ctypes.Structure):
    _fields_ = [
        ("inv_freq", _p),
        ("angles", _p),
        ("scale", _f),
        ("num_pairs", _i),
        ("type", _i),
    ]


class NormOp(ctypes.Structure):
    _fields_ = [
        ("hidden", _p),
        ("delta", _p),
        ("out", _p),
        ("weight", _p),
        ("stride", _n),
        ("size", _i),
        ("eps", _f),
        ("type", _i),
    ]


class RotateOp(ctypes.Structure):
    _fields_ = [
        ("x", _p),
        ("stride", _n),
        ("norm_weight", _p),
        ("angles", _p),
        ("num_heads", _i),
        ("head_size", _i),
        ("eps", _f),
        ("type", _i),
    ]


class GateOp(ctypes.Structure):
    _fields_ = [
        ("x", _p),
        ("out", _p),
        ("x_stride", _n),
        ("out_stride", _n),
        ("size", _i),
        ("activation", _i),
        ("type", _i),
    ]


class OperationLibrary:
    """The compiled library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.PyDLL(str(path))
        for kind in KINDS:
            function = getattr(self._library, f"dovetail_{kind}_op")
            function.restype, function.argtypes = None, [_p, _p]

    @classmethod
    def load(cls, facts: DeviceFacts) -> OperationLibrary:
        """Build the library at first use. Raises `PluginError`."""
        return cls(build_library("models-torch", SOURCES, facts, openmp=openmp_of("torch")))

    def op(self, kind: str, arguments: ctypes.Structure) -> Op:
        """Return an operation; `arguments` must live as long as it is run."""
        op = Op()
        describe = getattr(self._library, f"dovetail_{kind}_op")
        describe(ctypes.addressof(op), ctypes.addressof(arguments))
        return op
