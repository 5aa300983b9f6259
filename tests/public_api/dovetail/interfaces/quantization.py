from __future__ import annotations
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol
from dovetail.errors import CheckpointError, ConfigError
from dovetail.plan import Plan
CONTRACT = '0.1'
Array = Any
PLAIN = 'none'
Side = Literal['out', 'in']
Scale = Literal['not zero', 'not negative', 'positive']

@dataclass(frozen=True)
class QuantizationCapabilities:
    methods: tuple[str, ...] = ()
    on_the_fly: bool = False
    framework: str = 'torch'
    devices: tuple[str, ...] | None = ('cpu',)
    dtypes: tuple[str, ...] | None = ('float32', 'bfloat16', 'float16')
    activations: str | None = None
    examples: tuple[dict[str, Any], ...] = ()
    codes: tuple[str, ...] = ()
    compiled_steps: bool = False

@dataclass(frozen=True)
class Part:
    name: str
    out_features: int

@dataclass(frozen=True)
class LinearLayer:
    name: str
    parts: tuple[Part, ...]
    in_features: int
    bias: bool
    dtype: str
    device: str = 'cpu'
    stored: bool = True

    @property
    def out_features(self) -> int:
        ...

    def part(self, index: int) -> LinearLayer:
        ...

    def shard(self, side: Side, rank: int, size: int) -> LinearLayer:
        ...

    def alike(self, answer: Callable[[str], object], what: str) -> Any:
        ...

def quantization_rule(plan: Plan, layer: LinearLayer) -> str:
    ...

@dataclass(frozen=True)
class Axis:
    side: Side
    features: int = 1
    elements: int = 1

    def size(self, features: int) -> int:
        ...
Index = tuple[int | slice, ...]

@dataclass(frozen=True)
class Parameter:
    axes: tuple[Axis | int, ...]
    dtype: str
    scale: Scale | None = None

    def part_shape(self, layer: LinearLayer, part: int) -> tuple[int, ...]:
        ...

    def shape(self, layer: LinearLayer) -> tuple[int, ...]:
        ...

    def part_index(self, layer: LinearLayer, part: int) -> Index:
        ...

    def shard_index(self, layer: LinearLayer, part: int, side: Side, rank: int, size: int) -> Index:
        ...

    def check(self, name: str, tensor: Array) -> None:
        ...

@dataclass(frozen=True)
class Declined:
    reason: str

class Scheme(Protocol):
    unused: tuple[str, ...]

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        ...

    def linear(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> Callable[[Array], Array]:
        ...

    def kv_scales(self, name: str) -> dict[str, Parameter] | None:
        ...

    def nbytes(self, layer: LinearLayer) -> int:
        ...

    def dequantize(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> Array:
        ...

    def quantize(self, layer: LinearLayer, weight: Array) -> dict[str, Array]:
        ...
