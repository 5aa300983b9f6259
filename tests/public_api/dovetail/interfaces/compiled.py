from __future__ import annotations
import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from dovetail.interfaces.architecture import Embedding, Linear, Model
from dovetail.interfaces.attention import AttentionBackend, AttentionLayer
CONTRACT = '0.1'

class Op(ctypes.Structure):
    ...

class StepHeader(ctypes.Structure):
    ...

class AttentionCall(ctypes.Structure):
    ...

class Compiled(NamedTuple):
    ops: list[Op]
    keep: Any

class CompiledLinear(Linear, Protocol):

    def compile(self, x: Any, y: Any) -> Compiled:
        ...

class CompiledEmbedding(CompiledLinear, Embedding, Protocol):

    def compile_rows(self, hidden: Any) -> Compiled:
        ...

class CompiledAttention(AttentionBackend, Protocol):

    def compile(self, layer: AttentionLayer, cache: Any, call: AttentionCall) -> Compiled:
        ...

    def address(self, layer: AttentionLayer, plan: Any) -> int:
        ...

class CompiledForward(NamedTuple):
    compiled: Compiled
    hidden: Any
    num_multiplies: int

class CompilableModel(Model, Protocol):

    def compile_forward(self, max_num_tokens: int, backends: Sequence[CompiledAttention], caches: Sequence[Any]) -> CompiledForward:
        ...
