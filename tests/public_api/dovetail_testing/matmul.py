from __future__ import annotations
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING
from dovetail.interfaces.matmul import Inputs, Matmul, MatmulCapabilities, WeightFormat, dequantized
from dovetail.interfaces.quantization import LinearLayer, Part
from dovetail.plugin.provider import Provider
from dovetail_testing.contract import Broken, Contract, common_causes
from dovetail_testing.layers import PRECISION, compare, held_bytes
if TYPE_CHECKING:
    from torch import Tensor
SHAPES = ((256, 256), (192, 1024), (61, 128), (128, 100), (8, 8), (320, 33))
ROWS = (1, 2, 3, 5, 7, 16, 33, 130)
GROUPS = (32, 64, 128)
LARGEST = {'int8': 127, 'float8_e4m3fn': 448}

@dataclass(frozen=True)
class Product:
    format: WeightFormat
    outs: int = 128
    in_features: int = 256
    num_rows: int = 3
    bias: bool = True
    dtype: str = 'float32'

    def layer(self, device: str) -> LinearLayer:
        ...

    def simpler(self) -> list[Product]:
        ...

class MatmulContract(Contract):
    extension_point = 'matmul'

    @property
    def can(self) -> MatmulCapabilities:
        ...

    @common_causes('the provider declares no capabilities')
    def test_declaration(self) -> None:
        ...

    @common_causes('the halves of a byte are in the wrong order', 'a zero point is left out', 'the last group has another size', 'sums are computed in 16 bits', 'rows of x are not adjacent', 'the order of the inputs is applied the wrong way round')
    def test_products_are_those_of_the_dequantized_weight(self) -> None:
        ...

    @common_causes('one scale is used for all rows of x', 'ties are rounded away from zero instead of to even', 'the inverse of the input scale is used')
    def test_rounded_inputs(self) -> None:
        ...

    @common_causes('a division by a scale of zero')
    def test_zeros_are_zeros(self) -> None:
        ...

    @common_causes('NaN is rounded to a number', 'the maximum ignores NaN')
    def test_what_is_no_number_stays_none(self) -> None:
        ...

    @common_causes('the canonical tensors are kept besides a converted form', 'codes are expanded and kept')
    def test_memory_is_as_declared(self) -> None:
        ...

    def new(self) -> Matmul:
        ...

    @property
    def dtypes(self) -> tuple[str, ...]:
        ...

    def formats(self, inputs: Inputs | None) -> list[WeightFormat]:
        ...

    def input(self, one: Product) -> Tensor:
        ...

    def made(self, one: Product) -> tuple[Callable[[Tensor], Tensor], LinearLayer, dict[str, Tensor]]:
        ...

    def check(self, one: Product) -> None:
        ...

class KitMatmul:

    def linear(self, format: WeightFormat, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        ...

    def nbytes(self, format: WeightFormat, layer: LinearLayer) -> int:
        ...
KIT_MATMUL = Provider('kit-matmul', 'computed by the definition', lambda context, options: KitMatmul(), capabilities=MatmulCapabilities(('int8', 'uint4', 'float8_e4m3fn'), ('int8', 'float8_e4m3fn'), devices=None))

def rounded_inputs(x: Tensor, to: Inputs, tensors: dict[str, Tensor]) -> Tensor:
    ...
