"""Define compiled steps: what an attention backend or a linear layer offers so that a worker can
run it without Python.

A worker that compiles its steps asks each component for its operations once, when buffers and
caches are allocated, and runs all of them in one call per step. The C side, with the rules for
sharing work between threads, is in `native/include/dovetail/step.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from dovetail.interfaces.architecture import Embedding, Linear, Model
from dovetail.interfaces.attention import AttentionBackend, AttentionLayer

CONTRACT = "0.1"


class Op(ctypes.Structure):
    """The C struct `dovetail_op`."""

    _fields_ = [("pieces", ctypes.c_void_p), ("piece", ctypes.c_void_p), ("self", ctypes.c_void_p)]


class StepHeader(ctypes.Structure):
    """The C struct `dovetail_step`."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_threads")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "attention")),
    ]


class AttentionCall(ctypes.Structure):
    """The C struct `dovetail_attention_call`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        ("type", ctypes.c_int32),
    ]


class Compiled(NamedTuple):
    """Operations to run one after the other, and the objects that must stay alive as long as they
    are used."""

    ops: list[Op]
    keep: Any


class CompiledLinear(Linear, Protocol):
    """A linear layer that can be part of a compiled step."""

    def compile(self, x: Any, y: Any) -> Compiled:
        """Return the operation `y[:T] = self(x[:T])` on buffers of the worker. Called once.

        `x [max_num_tokens, ≥ in]` and `y [max_num_tokens, ≥ out]` have contiguous rows; rows of x
        are zero from the end of the inputs to the next multiple of 32.
        """


class CompiledEmbedding(CompiledLinear, Embedding, Protocol):
    """An embedding that can be part of a compiled step."""

    def compile_rows(self, hidden: Any) -> Compiled:
        """Return the operation `hidden[:T] = self.rows(token_ids)` on a buffer of the worker's."""


class CompiledAttention(AttentionBackend, Protocol):
    """An attention backend that declares `compiled_steps`.

    A step runs on as many threads as the tensor library is set to use when `plan` is called.
    """

    def compile(self, layer: AttentionLayer, cache: Any, call: AttentionCall) -> Compiled:
        """Return the operations of `run` for one layer: write keys and values, then attend."""

    def address(self, layer: AttentionLayer, plan: Any) -> int:
        """Return the address that this step's operations read as `step->attention[layer.index]`. It
        stays valid as long as the plan."""


class CompiledForward(NamedTuple):
    """A model's forward pass as operations, in their order."""

    compiled: Compiled
    hidden: Any
    """Buffer whose first T rows are the hidden states `[T, H]` after a step, the final norm
    applied."""
    num_multiplies: int
    """Multiplications for one token, the attention's aside. A worker may release Python's lock for
    a step that takes long."""


class CompilableModel(Model, Protocol):
    """A model of an architecture whose capabilities say `compiled="operations"`."""

    def compile_forward(
        self, max_num_tokens: int, backends: Sequence[CompiledAttention], caches: Sequence[Any]
    ) -> CompiledForward:
        """Return the operations of `forward`, for steps of up to `max_num_tokens` tokens.

        `backends` and `caches` are those of the attention layers, in order. The model's linear
        layers are `CompiledLinear`s, its embedding is a `CompiledEmbedding`, and their weights have
        been read. Called again when the caches change.
        """
