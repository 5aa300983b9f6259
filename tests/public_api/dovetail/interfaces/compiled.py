from __future__ import annotations
import ctypes
from typing import Any, NamedTuple, Protocol
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

class CompiledLinear(Protocol):

    def compile(self, x: Any, y: Any) -> Compiled:
        ...

class CompiledAttention(AttentionBackend, Protocol):

    def compile(self, layer: AttentionLayer, cache: Any, call: AttentionCall) -> Compiled:
        ...

    def address(self, layer: AttentionLayer, plan: Any) -> int:
        ...
