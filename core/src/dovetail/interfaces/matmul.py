"""Define GEMM with quantized weights, the fast kernel that many schemes share.

A scheme knows how checkpoints store a weight; a matmul provider knows how to multiply by it on one
kind of device. Between them is a canonical form: codes, scales per group, and optionally zero
points. A new checkpoint format whose codes are int8, uint4 or FP8 (E4M3) needs no kernel, and a new
kernel serves all formats. Other codes (FP4, for example) cannot be expressed yet.

    weight[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])        with g = i // group_size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dovetail.interfaces.quantization import LinearLayer, Parameter

CONTRACT = "0.1"
Array = Any

Codes = Literal["int8", "uint4", "float8_e4m3fn"]
Inputs = Literal["int8", "float8_e4m3fn"]


@dataclass(frozen=True)
class WeightFormat:
    """The canonical form of a weight `[out, in]`, with these tensors:

    - "codes": "int8" and "float8_e4m3fn" are `[out, in]`; "uint4" is `u8[out, ceil(in / 2)]` with
      the first of two codes in the low half
    - "scales": `f32[out, num_groups]`
    - "zeros", if the format has them: `[out, num_groups]`, u8 for "uint4" and i8 for "int8".
      Without them the zero point is 8 for "uint4" and 0 for the others
    - "order", if the format has one: `i64[in]`; codes[:, k] belongs to x[:, order[k]]
    - "input_scale", if the format has one: `f32[1]`, for all rows of x
    - "bias", if the layer has one: `[out]`, of the layer's dtype
    """

    codes: Codes
    group_size: int | None = None
    """Number of inputs that share a scale; None means all. The last group may be smaller."""
    zeros: bool = False
    order: bool = False
    inputs: Inputs | None = None
    """Type to which x is quantized before the GEMM: per row, with its largest absolute value over
    127 (int8) or 448 (float8) as the scale, unless the format has an input_scale."""
    input_scale: bool = False

    def __str__(self) -> str:
        per = "one scale per output" if self.group_size is None else f"groups of {self.group_size}"
        more = ", zeros" * self.zeros + ", reordered inputs" * self.order
        rounded = (
            ""
            if self.inputs is None
            else f", inputs {self.inputs}{' with a fixed scale' * self.input_scale}"
        )
        return f"{self.codes}, {per}{more}{rounded}"

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size is None else -(-in_features // self.group_size)

    @property
    def bits(self) -> int:
        return 4 if self.codes == "uint4" else 8

    def nbytes(self, layer: LinearLayer) -> int:
        """Return the bytes of these tensors, without the bias."""
        codes = -(-layer.in_features // 2) if self.bits == 4 else layer.in_features
        groups = self.num_groups(layer.in_features) * (5 if self.zeros else 4)
        return layer.out_features * (codes + groups) + (layer.in_features * 8 if self.order else 0)


@dataclass(frozen=True)
class MatmulCapabilities:
    """Capabilities of a matmul provider, as data. The core rejects what is not declared."""

    codes: tuple[Codes, ...] = ()
    inputs: tuple[Inputs, ...] = ()
    """Types of quantized inputs. Inputs that are not quantized are always supported."""
    framework: str = "torch"
    devices: tuple[str, ...] | None = ("cpu",)
    """Supported devices; None means any."""
    dtypes: tuple[str, ...] | None = ("float32", "bfloat16", "float16")
    """Dtypes of x and of the product; None means any."""
    group_sizes: tuple[int, ...] | None = None
    """Supported group sizes; None means any."""
    compiled_steps: bool = False
    """Its layers are `CompiledLinear`s, which can be part of a compiled step
    (interfaces/compiled.py)."""


class Matmul(Protocol):
    """The object that a matmul provider builds; one object per engine."""

    def linear(
        self, format: WeightFormat, layer: LinearLayer, tensors: Mapping[str, Array]
    ) -> Callable[[Array], Array]:
        """Build the callable for `x [T, in]` → `x @ weight.T + bias`, a new array of the dtype of
        x. Rows of x are contiguous; the row stride is arbitrary.

        The callable may hold the tensors, or a converted form, as long as it lives.
        """

    def nbytes(self, format: WeightFormat, layer: LinearLayer) -> int:
        """Return the bytes of the layer's weights in memory, without its bias."""


def dequantized(format: WeightFormat, in_features: int, tensors: Mapping[str, Array]) -> Array:
    """Compute the weight that torch tensors of a format represent, `f32[out, in]`. This is the
    definition of the format and the reference for kernels."""
    codes, scales = tensors["codes"], tensors["scales"]
    if format.codes == "uint4":
        codes = (codes[:, :, None] >> codes.new_tensor([0, 4]) & 15).flatten(1)[:, :in_features]
    group = format.group_size or in_features
    zeros = (
        tensors["zeros"].float()
        if format.zeros
        else scales * 0 + (8 if format.codes == "uint4" else 0)
    )
    spread = [t.repeat_interleave(group, 1)[:, :in_features] for t in (scales, zeros)]
    weight = spread[0] * (codes.float() - spread[1])
    return weight[:, tensors["order"].argsort()] if format.order else weight


class MatmulScheme:
    """Base class of a `Scheme` that uses the matmul extension point. A subclass returns the layer's
    format and converts the checkpoint's tensors to the canonical form. `tensors` are those that
    `parameters` declares."""

    unused: tuple[str, ...] = ()

    def __init__(self, matmul: Matmul) -> None:
        self.matmul = matmul

    def format(self, layer: LinearLayer) -> WeightFormat:
        raise NotImplementedError

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Convert to the tensors of `format(layer)`. May raise `CheckpointError`."""
        raise NotImplementedError

    def linear(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> Callable[[Array], Array]:
        bias = {"bias": tensors["bias"]} if layer.bias else {}
        return self.matmul.linear(
            self.format(layer), layer, {**self.canonical(layer, tensors), **bias}
        )

    def nbytes(self, layer: LinearLayer) -> int:
        return self.matmul.nbytes(self.format(layer), layer)

    def dequantize(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> Array:
        return dequantized(self.format(layer), layer.in_features, self.canonical(layer, tensors))

    def kv_scales(self, name: str) -> dict[str, Parameter] | None:
        return None

    def quantize(self, layer: LinearLayer, weight: Array) -> dict[str, Array]:
        raise NotImplementedError
