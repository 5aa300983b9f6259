"""Test the contract of the matmul extension point. A plugin's test is a subclass:

    class TestMyMatmul(MatmulContract):
        provider = PROVIDER

Random weights of every declared format, in the canonical form, are compared with `dequantized`,
which is the definition of the format.
"""

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

SHAPES = (256, 256), (192, 1024), (61, 128), (128, 100), (8, 8), (320, 33)
"""Numbers of outputs and inputs."""
ROWS = 1, 2, 3, 5, 7, 16, 33, 130
GROUPS = 32, 64, 128
LARGEST = {"int8": 127, "float8_e4m3fn": 448}


@dataclass(frozen=True)
class Product:
    """A GEMM to test."""

    format: WeightFormat
    outs: int = 128
    in_features: int = 256
    num_rows: int = 3
    bias: bool = True
    dtype: str = "float32"

    def __str__(self) -> str:
        f = self.format
        group = "one scale per row" if f.group_size is None else f"groups of {f.group_size}"
        more = (
            ", zeros" * f.zeros
            + ", reordered inputs" * f.order
            + (f", inputs quantized to {f.inputs}" if f.inputs else "")
        )
        size = f"{self.num_rows} rows by [{self.outs}, {self.in_features}]"
        return (
            f"{size}, {f.codes} in"
            f" {group}{more}{', an input scale' * f.input_scale}{', bias' * self.bias},"
            f" {self.dtype}"
        )

    def layer(self, device: str) -> LinearLayer:
        return LinearLayer(
            "kit", (Part("kit", self.outs),), self.in_features, self.bias, self.dtype, device
        )

    def simpler(self) -> list[Product]:
        found = [
            replace(self, num_rows=1),
            replace(self, bias=False),
            replace(self, dtype="float32"),
            replace(self, outs=16),
        ]
        found += [
            replace(self, in_features=32),
            replace(self, format=replace(self.format, zeros=False)),
        ]
        found += [replace(self, format=replace(self.format, order=False, input_scale=False))]
        return [one for one in found if one != self]


class MatmulContract(Contract):
    """The contract of matmul providers, for weights of every declared format."""

    extension_point = "matmul"

    @property
    def can(self) -> MatmulCapabilities:
        can = self.provider.capabilities
        assert isinstance(can, MatmulCapabilities), (
            "the capabilities of a matmul provider must be MatmulCapabilities"
        )
        return can

    @common_causes("the provider declares no capabilities")
    def test_declaration(self) -> None:
        """The provider declares at least one kind of codes and one dtype."""
        assert self.can.framework == "torch", "the kit supports only torch tensors"
        assert self.can.codes, "no codes are declared"
        assert self.can.dtypes is None or self.can.dtypes, "no dtypes are declared"

    @common_causes(
        "the halves of a byte are in the wrong order",
        "a zero point is left out",
        "the last group has another size",
        "sums are computed in 16 bits",
        "rows of x are not adjacent",
        "the order of the inputs is applied the wrong way round",
    )
    def test_products_are_those_of_the_dequantized_weight(self) -> None:
        """The result is `x @ dequantized().T + bias` in x's dtype, for every format, for shapes
        that are no multiples of tile sizes, and any number of rows."""
        formats = self.formats(None)
        tried = [Product(f, outs, n) for f in formats for outs, n in SHAPES]
        tried += [
            Product(f, num_rows=rows, dtype=dtype)
            for f in formats
            for rows in ROWS
            for dtype in self.dtypes
        ]
        for one in tried:
            self.attempt(one, self.check, Product.simpler)

    @common_causes(
        "one scale is used for all rows of x",
        "ties are rounded away from zero instead of to even",
        "the inverse of the input scale is used",
    )
    def test_rounded_inputs(self) -> None:
        """Inputs are quantized as the format requires: with a scale per row, or with the format's
        scale for all rows."""
        for inputs in self.can.inputs:
            for f in self.formats(inputs):
                for rows, dtype in product((1, 5, 33), self.dtypes):
                    self.attempt(
                        Product(f, num_rows=rows, dtype=dtype), self.check, Product.simpler
                    )

    @common_causes("a division by a scale of zero")
    def test_zeros_are_zeros(self) -> None:
        """The result for a row of zeros is exactly the bias."""
        import torch

        for inputs in (None, *self.can.inputs):
            for f in self.formats(inputs):
                one = Product(f)
                multiply, _, tensors = self.made(one)
                out = multiply(
                    torch.zeros(2, one.in_features, dtype=torch.float32, device=self.device)
                )
                assert torch.equal(out, tensors["bias"].expand(2, -1)), (
                    f"{one}: a row of zeros gives {out.abs().max():.3g}"
                )

    @common_causes("NaN is rounded to a number", "the maximum ignores NaN")
    def test_what_is_no_number_stays_none(self) -> None:
        """A row with NaN has NaN in its product, and no other row has."""
        import torch

        for inputs in (None, *self.can.inputs):
            for f in self.formats(inputs):
                one = Product(f, num_rows=7)
                multiply, _, _ = self.made(one)
                x = self.input(one)
                x[2, 5] = torch.nan
                out = multiply(x)
                assert bool(out[2].isnan().any()), f"{one}: NaN was lost"
                assert bool(out[[0, 1, 3, 4, 5, 6]].isfinite().all()), (
                    f"{one}: NaN of row 2 appears in other rows"
                )

    @common_causes(
        "the canonical tensors are kept besides a converted form", "codes are expanded and kept"
    )
    def test_memory_is_as_declared(self) -> None:
        """The memory of a layer is within 5 % of `nbytes`."""
        for f in self.formats(None):
            one = Product(f, 1024, 1024, bias=False)
            multiply, layer, tensors = self.made(one)
            matmul = self.new()
            del tensors
            held, declared = held_bytes(multiply) - held_bytes(matmul), matmul.nbytes(f, layer)
            assert declared * 0.95 <= held <= declared * 1.05 + 4096, (
                f"{one}: {held} bytes are in use, but {declared} are declared"
            )

    # How a product is tested.

    def new(self) -> Matmul:
        matmul: Matmul = self.build(self.build_context())
        return matmul

    @property
    def dtypes(self) -> tuple[str, ...]:
        return self.can.dtypes or tuple(PRECISION)

    def formats(self, inputs: Inputs | None) -> list[WeightFormat]:
        """Return the declared formats: with and without groups, with zeros, with an order of the
        inputs."""
        found: list[WeightFormat] = []
        for codes in self.can.codes:
            if inputs == "int8" and codes == "float8_e4m3fn":
                continue  # not used in practice
            groups = [
                g for g in GROUPS if self.can.group_sizes is None or g in self.can.group_sizes
            ]
            found += [WeightFormat(codes, g, inputs=inputs) for g in (None, *groups)]
            if codes != "float8_e4m3fn":
                found += [
                    WeightFormat(codes, g, zeros=True, inputs=inputs) for g in (None, *groups[-1:])
                ]
            found += [WeightFormat(codes, g, order=True, inputs=inputs) for g in groups[-1:]]
        return found + [replace(f, input_scale=True) for f in found[:1] if inputs is not None]

    def input(self, one: Product) -> Tensor:
        """Return rows of different magnitudes that are not adjacent in memory."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(one.num_rows, one.in_features + 32, generator=generator)
        # A fixed input scale suits rows of about its range: in a row of small codes, one value
        # rounded the other way at a tie would exceed the limit of `check`.
        least = 0 if one.format.input_scale else -3
        x *= 2.0 ** torch.randint(least, 4, (one.num_rows, 1), generator=generator)
        return x.to(getattr(torch, one.dtype)).to(self.device)[:, : one.in_features]

    def made(
        self, one: Product
    ) -> tuple[Callable[[Tensor], Tensor], LinearLayer, dict[str, Tensor]]:
        import torch

        f, generator = one.format, torch.Generator().manual_seed(self.seed + 1)
        shape, groups = (one.outs, one.in_features), (one.outs, f.num_groups(one.in_features))
        codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        if f.codes == "uint4":
            padded = torch.nn.functional.pad(codes & 15, (0, one.in_features % 2))
            codes = padded[:, 0::2] | padded[:, 1::2] << 4
        elif f.codes == "int8":
            codes = codes.view(torch.int8)
        else:
            codes = (
                torch.where(codes & 127 == 127, 3, codes).to(torch.uint8).view(torch.float8_e4m3fn)
            )
        tensors = {"codes": codes, "scales": torch.rand(groups, generator=generator) * 0.01 + 0.001}
        if f.zeros:
            low, high, kept = (
                (0, 16, torch.uint8) if f.codes == "uint4" else (-128, 128, torch.int8)
            )
            tensors["zeros"] = torch.randint(low, high, groups, generator=generator).to(kept)
        if f.order:
            tensors["order"] = torch.randperm(one.in_features, generator=generator)
        if f.input_scale:
            tensors["input_scale"] = torch.rand(1, generator=generator) * 0.01 + 0.015
        if one.bias:
            tensors["bias"] = torch.randn(one.outs, generator=generator).to(
                getattr(torch, one.dtype)
            )
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        layer = one.layer(self.device)
        return self.new().linear(f, layer, tensors), layer, tensors

    def check(self, one: Product) -> None:
        import torch

        multiply, _, tensors = self.made(one)
        x = self.input(one)
        before = x.clone()
        out = multiply(x)
        if out.dtype != x.dtype or out.shape != (one.num_rows, one.outs):
            raise Broken(f"x {[*x.shape]} {x.dtype} became {[*out.shape]} {out.dtype}")
        rounded = (
            x.double()
            if one.format.inputs is None
            else rounded_inputs(x.double(), one.format.inputs, tensors)
        )
        exact = rounded @ dequantized(one.format, one.in_features, tensors).double().T
        # A value halfway between two codes may be rounded either way, which affects a few elements.
        limit = PRECISION[one.dtype] + (2e-3 if one.format.inputs else 0)
        compare(
            out,
            exact + (tensors["bias"].double() if one.bias else 0),
            limit,
            "x @ dequantized().T + bias",
        )
        if not torch.equal(x, before):
            raise Broken("the input was modified")
        if not torch.equal(multiply(x), out):
            raise Broken("the same input gave two different results")


class KitMatmul:
    """A `Matmul` computed by the definition, for tests of schemes."""

    def linear(
        self, format: WeightFormat, layer: LinearLayer, tensors: Mapping[str, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}

        def multiply(x: Tensor) -> Tensor:
            given = (
                x.double()
                if format.inputs is None
                else rounded_inputs(x.double(), format.inputs, kept)
            )
            out: Tensor = given @ dequantized(format, layer.in_features, kept).double().T
            return (out + kept["bias"].double() if layer.bias else out).to(x.dtype)

        return multiply

    def nbytes(self, format: WeightFormat, layer: LinearLayer) -> int:
        return format.nbytes(layer)


KIT_MATMUL = Provider(
    "kit-matmul",
    "computed by the definition",
    lambda context, options: KitMatmul(),
    capabilities=MatmulCapabilities(
        ("int8", "uint4", "float8_e4m3fn"), ("int8", "float8_e4m3fn"), devices=None
    ),
)


def rounded_inputs(x: Tensor, to: Inputs, tensors: dict[str, Tensor]) -> Tensor:
    """Quantize and dequantize inputs as `WeightFormat` defines it, in float64."""
    import torch

    scale = (
        tensors["input_scale"].double()
        if "input_scale" in tensors
        else x.abs().amax(1, keepdim=True) / LARGEST[to]
    )
    scale = torch.where(scale == 0, 1.0, scale)
    limited = (x / scale).clamp(-LARGEST[to], LARGEST[to])
    rounded: Tensor = (
        limited.round() if to == "int8" else limited.float().to(torch.float8_e4m3fn).double()
    )
    return rounded * scale
