"""Products by quantized weights: the fast part that many schemes share.

A scheme knows how checkpoints store a weight; a matmul provider knows how one kind of device
multiplies by it. Between them lies a canonical form: codes, scales by group, perhaps zero points.
A new checkpoint format whose codes are int8, uint4 or FP8 (E4M3) needs no kernel, and a new kernel
serves all formats. Other codes (FP4, for example) are not expressible yet.

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
    """How a weight `[out, in]` lies in its tensors:

    - "codes": "int8" and "float8_e4m3fn" `[out, in]`; "uint4" as `u8[out, ceil(in / 2)]`, the first
      of two in the low half
    - "scales": `f32[out, num_groups]`
    - "zeros", if the format has them: `[out, num_groups]`, u8 for "uint4" and i8 for "int8".
      Without them it is 8 for "uint4", 0 for the others
    - "order", if the format has one: `i64[in]`; codes[:, k] belongs to x[:, order[k]]
    - "input_scale", if the format has one: `f32[1]`, for all rows of x
    - "bias", if the layer has one: `[out]`, of the layer's dtype
    """

    codes: Codes
    group_size: int | None = None
    """Inputs that share a scale; None: all. The last group may be smaller."""
    zeros: bool = False
    order: bool = False
    inputs: Inputs | None = None
    """What x is rounded to before the product: each row by a scale of its own, its largest absolute
    value over 127 (int8) or 448 (float8), unless the format has an input_scale."""
    input_scale: bool = False

    def __str__(self) -> str:
        per = "one scale an output" if self.group_size is None else f"groups of {self.group_size}"
        more = ", zeros" * self.zeros + ", in an order" * self.order
        rounded = (
            ""
            if self.inputs is None
            else f", inputs {self.inputs}{' by a fixed scale' * self.input_scale}"
        )
        return f"{self.codes}, {per}{more}{rounded}"

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size is None else -(-in_features // self.group_size)

    @property
    def bits(self) -> int:
        return 4 if self.codes == "uint4" else 8

    def nbytes(self, layer: LinearLayer) -> int:
        """Of these tensors, the bias aside."""
        codes = -(-layer.in_features // 2) if self.bits == 4 else layer.in_features
        groups = self.num_groups(layer.in_features) * (5 if self.zeros else 4)
        return layer.out_features * (codes + groups) + (layer.in_features * 8 if self.order else 0)


@dataclass(frozen=True)
class MatmulCapabilities:
    """What a provider multiplies by, as data: the core refuses what is not declared."""

    codes: tuple[Codes, ...] = ()
    inputs: tuple[Inputs, ...] = ()
    """Beside inputs that are not rounded, which all take."""
    framework: str = "torch"
    devices: tuple[str, ...] | None = ("cpu",)
    """None is any."""
    dtypes: tuple[str, ...] | None = ("float32", "bfloat16", "float16")
    """Of x and of the product. None is any."""
    group_sizes: tuple[int, ...] | None = None
    """None is any."""
    compiled_steps: bool = False
    """Its layers are `CompiledLinear`s: they can be part of a compiled step
    (interfaces/compiled.py)."""


class Matmul(Protocol):
    """What a provider builds: one object an engine."""

    def linear(
        self, format: WeightFormat, layer: LinearLayer, tensors: Mapping[str, Array]
    ) -> Callable[[Array], Array]:
        """Make `x [T, in]` → `x @ weight.T + bias`, a new array of x's dtype. Rows of x are
        contiguous, and may lie apart.

        The callable may keep the tensors, or a form of its own, for as long as it lives.
        """

    def nbytes(self, format: WeightFormat, layer: LinearLayer) -> int:
        """Bytes that the weights take once the layer is made, its bias aside."""


def dequantized(format: WeightFormat, in_features: int, tensors: Mapping[str, Array]) -> Array:
    """The weight that torch tensors of a format stand for, `f32[out, in]`: the definition, and the
    reference of kernels."""
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
    """A `Scheme` whose layers the matmul extension point multiplies: it says a layer's format, and
    brings the checkpoint's tensors into the canonical form. `tensors` are those that `parameters`
    declares."""

    unused: tuple[str, ...] = ()

    def __init__(self, matmul: Matmul) -> None:
        self.matmul = matmul

    def format(self, layer: LinearLayer) -> WeightFormat:
        raise NotImplementedError

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors of `format(layer)`. May raise `CheckpointError`."""
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
