"""The worker's C++ (csrc/) behind ctypes: structs with the names of the headers, and the functions,
typed."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any

import torch

from dovetail.facts import DeviceFacts
from dovetail.interfaces.compiled import Op
from dovetail.native import build_library, openmp_of

SOURCES = Path(__file__).parent / "csrc"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_p, _i, _n = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class LinearStruct(ctypes.Structure):
    _fields_ = [("type", _i), ("num_outputs", _n), ("depth", _n), ("weight", _p), ("bias", _p)]


class LinearCall(ctypes.Structure):
    _fields_ = [("x", _p), ("y", _p), ("x_stride", _n), ("y_stride", _n), ("y_type", _i)]


class LinearOp(ctypes.Structure):
    _fields_ = [("linear", _p), ("call", LinearCall)]


class EmbedOp(ctypes.Structure):
    _fields_ = [("embedding", _p), ("hidden", _p), ("stride", _n)]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "dovetail_weight_bytes": (_n, [_p]),
    "dovetail_pack": (None, [_p, _p, _n, _n, _n]),
    "dovetail_unpack_rows": (None, [_p, _p, _n, _p, _n]),
    "dovetail_linear": (None, [_p, _p, _i, _i, _p]),
    "dovetail_new_team": (_p, []),
    "dovetail_stop_team": (None, [_p]),
    "dovetail_free_team": (None, [_p]),
    "dovetail_new_program": (_p, [_p, _n]),
    "dovetail_free_program": (None, [_p]),
    "dovetail_run_program": (None, [_p, _p, _p, _p]),
    "dovetail_argmax": (None, [_p, _n, _n, _n, _p, _p, _i, _p]),
    "dovetail_add_gumbel_noise": (None, [_p, _n, _n, _n, _p, _i, _p]),
    "dovetail_filter_top_k_top_p": (None, [_p, _n, _n, _n, _p, _p, _i, _p]),
    "dovetail_instruction_set": (ctypes.c_char_p, []),
    **{f"dovetail_{name}_op": (None, [_p, _p]) for name in ("linear", "embed")},
}


def _open(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Kernels:
    """The compiled library. Functions of `holding` keep Python's lock, which is for short calls:
    getting it back may take milliseconds where other threads are busy.

    They run on PyTorch's threads, or with `own_threads` on a team of threads that `team` is the
    address of: better where little of a step is torch's. The threads are started by the first call
    that needs them, and end with `close` (a call after that starts them again), with this object or
    with the process.
    """

    def __init__(self, path: Path, *, own_threads: bool = False) -> None:
        self.functions = _open(ctypes.CDLL(str(path)))
        self.holding = _open(ctypes.PyDLL(str(path)))
        self.team: int | None = None
        if own_threads:
            self.team = self.holding.dovetail_new_team()
            # Not at the exit of the process: a daemon thread may be in a step.
            weakref.finalize(self, self.functions.dovetail_free_team, self.team).atexit = False

    @classmethod
    def load(cls, facts: DeviceFacts, *, own_threads: bool = False, **options: Any) -> Kernels:
        """Build the library at first use. Raises `PluginError`."""
        library = build_library(
            "worker-torch", SOURCES, facts, openmp=openmp_of("torch"), **options
        )
        return cls(library, own_threads=own_threads)

    def close(self) -> None:
        if self.team is not None:
            self.functions.dovetail_stop_team(self.team)

    @property
    def instruction_set(self) -> str:
        return str(self.functions.dovetail_instruction_set().decode())

    def op(self, kind: str, arguments: ctypes.Structure) -> Op:
        """An operation of this library; `arguments` must live as long as it is run."""
        op = Op()
        getattr(self.holding, f"dovetail_{kind}_op")(
            ctypes.addressof(op), ctypes.addressof(arguments)
        )
        return op
