from __future__ import annotations
from collections.abc import Sequence
from typing import Any
from dovetail.errors import CheckpointError
from dovetail.interfaces.quantization import LinearLayer
Array = Any

def unpack(words: Array, bits: int, axis: int, order: Sequence[int] | None=None) -> Array:
    ...

def canonical_codes(codes: Array, bits: int) -> Array:
    ...

def canonical_zeros(zeros: Array, bits: int) -> Array:
    ...

def order_of_groups(layer: LinearLayer, name: str, g_idx: Array, group_size: int) -> Array:
    ...

def plain_groups(layer: LinearLayer, like: Array, group_size: int) -> Array:
    ...
