from __future__ import annotations
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from dovetail.interfaces.quantization import LinearLayer, Parameter
CONTRACT = '0.1'
Array = Any
Codes = Literal['int8', 'uint4', 'float8_e4m3fn']
Inputs = Literal['int8', 'float8_e4m3fn']

@dataclass(frozen=True)
class WeightFormat:
    codes: Codes
    group_size: int | None = None
    zeros: bool = False
    order: bool = False
    inputs: Inputs | None = None
    input_scale: bool = False

    def num_groups(self, in_features: int) -> int:
        ...

    @property
    def bits(self) -> int:
        ...

    def nbytes(self, layer: LinearLayer) -> int:
        ...

@dataclass(frozen=True)
class MatmulCapabilities:
    codes: tuple[Codes, ...] = ()
    inputs: tuple[Inputs, ...] = ()
    framework: str = 'torch'
    devices: tuple[str, ...] | None = ('cpu',)
    dtypes: tuple[str, ...] | None = ('float32', 'bfloat16', 'float16')
    group_sizes: tuple[int, ...] | None = None
    compiled_steps: bool = False

class Matmul(Protocol):

    def linear(self, format: WeightFormat, layer: LinearLayer, tensors: Mapping[str, Array]) -> Callable[[Array], Array]:
        ...

    def nbytes(self, format: WeightFormat, layer: LinearLayer) -> int:
        ...

def dequantized(format: WeightFormat, in_features: int, tensors: Mapping[str, Array]) -> Array:
    ...

class MatmulScheme:
    unused: tuple[str, ...] = ()

    def __init__(self, matmul: Matmul) -> None:
        ...

    def format(self, layer: LinearLayer) -> WeightFormat:
        ...

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> dict[str, Array]:
        ...

    def linear(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> Callable[[Array], Array]:
        ...

    def nbytes(self, layer: LinearLayer) -> int:
        ...

    def dequantize(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> Array:
        ...

    def kv_scales(self, name: str) -> dict[str, Parameter] | None:
        ...

    def quantize(self, layer: LinearLayer, weight: Array) -> dict[str, Array]:
        ...
