"""Define quantization: how the weights of linear layers are stored and multiplied.

For each linear layer a scheme either declares the tensors that it stores (`parameters`) or gives
the reason why the layer stays unquantized. The declaration determines, in the same way for every
scheme, which of the checkpoint's tensors are read, where the parts of a fused layer (q, k and v)
are placed, and what a shard of a layer holds. When all tensors of a layer are loaded, `linear`
builds the callable that multiplies by them.

A checkpoint may hold a layer as the scheme stores it, or as a plain (unquantized) weight, which
`quantize` converts while it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from dovetail.errors import CheckpointError, ConfigError
from dovetail.plan import Plan

CONTRACT = "0.1"
Array = Any

PLAIN = "none"
"""The method of a checkpoint that is not quantized."""

Side = Literal["out", "in"]
Scale = Literal["not zero", "not negative", "positive"]
"""Which values a scale may have; infinities and NaN are never allowed. "not zero": some tools write
negative scales. "not negative": the scale is 0 where all weights are zero. "positive": inputs, keys
or values are divided by it."""


@dataclass(frozen=True)
class QuantizationCapabilities:
    """Capabilities of a quantization scheme, as data. The core rejects what is not declared, with
    the reason."""

    methods: tuple[str, ...] = ()
    """Checkpoints that it reads, by `quant_method` of their quantization_config. `PLAIN` is a
    checkpoint that is not quantized."""
    on_the_fly: bool = False
    """True if it can quantize plain weights while they are loaded."""
    framework: str = "torch"
    devices: tuple[str, ...] | None = ("cpu",)
    """Supported devices; None means any."""
    dtypes: tuple[str, ...] | None = ("float32", "bfloat16", "float16")
    """Dtypes of a layer's input and output; None means any."""
    activations: str | None = None
    """Type to which a layer quantizes its inputs before the GEMM: "int8", "float8_e4m3fn"; None if
    it does not."""
    examples: tuple[dict[str, Any], ...] = ()
    """quantization_configs of checkpoints that it reads, at least one per method, for the
    conformance tests."""
    codes: tuple[str, ...] = ()
    """The `WeightFormat.codes` that it passes to the matmul extension point (interfaces/matmul.py).
    Empty: it has its own GEMM. If a checkpoint or the options need less than all of `codes` and
    `activations`, `Provider.needs` says so."""
    compiled_steps: bool = False
    """Its layers are `CompiledLinear`s, which can be part of a compiled step
    (interfaces/compiled.py), if those that the matmul extension point builds for it are."""


@dataclass(frozen=True)
class Part:
    """One of the checkpoint's layers in a fused layer, such as `q_proj` in `qkv_proj`, with its
    full name."""

    name: str
    out_features: int


@dataclass(frozen=True)
class LinearLayer:
    """Constants of a linear layer: `x [T, in_features]` → `[T, out_features]`."""

    name: str
    """Full name: "model.layers.3.mlp.down_proj"."""
    parts: tuple[Part, ...]
    """Parts in the order of the output. Usually one, with the layer's name."""
    in_features: int
    bias: bool
    dtype: str
    """Dtype of x, of the output and of the bias."""
    device: str = "cpu"
    stored: bool = True
    """True if the checkpoint holds the layer as the scheme stores it; False if it holds a plain
    weight, for `quantize`."""

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    def part(self, index: int) -> LinearLayer:
        """Return one part as a separate layer."""
        part = self.parts[index]
        return replace(self, name=part.name, parts=(part,))

    def shard(self, side: Side, rank: int, size: int) -> LinearLayer:
        """Return what one of `size` ranks holds: a share of each part's outputs, or of the inputs.
        Raises `ValueError`."""
        shared = (
            [(p.name, p.out_features) for p in self.parts]
            if side == "out"
            else [(self.name, self.in_features)]
        )
        for name, features in shared:
            if features % size:
                raise ValueError(
                    f"{name} has {features} {side}puts, which {size} ranks cannot share evenly"
                )
        if side == "in":
            return replace(self, in_features=self.in_features // size)
        return replace(self, parts=tuple(Part(p.name, p.out_features // size) for p in self.parts))

    def alike(self, answer: Callable[[str], object], what: str) -> Any:
        """Return `answer` for a part's name, which must be the same for all parts. Raises a
        `ConfigError` that lists the answers if they differ.

        `what` names the question for the error message, such as "the checkpoint's ignore list".
        """
        answers = {part.name: answer(part.name) for part in self.parts}
        first = next(iter(answers.values()))
        if any(a != first for a in answers.values()):
            listing = ", ".join(f"{name}: {a}" for name, a in answers.items())
            raise ConfigError(
                f"{what} must treat all parts of the fused layer {self.name} alike, but the answers"
                f" differ: {listing}"
            )
        return first


def quantization_rule(plan: Plan, layer: LinearLayer) -> str:
    """Return the plan key of the quantization rule that applies to a layer. Raises `ConfigError` if
    the rules for the parts of a fused layer differ."""
    rules = plan.quantization_rules
    kinds = {
        key: " ".join([c.provider, *(f"{k}={v}" for k, v in c.options.items())])
        for key, c in rules.items()
    }

    def first(name: str) -> str:
        return next(key for key, choice in rules.items() if fnmatchcase(name, choice.match))

    layer.alike(lambda name: kinds[first(name)], "quantization: the rules")
    return first(layer.parts[0].name)


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter along a layer's outputs or inputs: `elements` elements for every
    `features` features.

    `Axis("in", 8)` is eight 4-bit weights in an int32; `Axis("in", 128)` is one scale per group of
    128 inputs; `Axis("out", 128)` is one per block of 128 outputs, the last of which may be
    smaller.
    """

    side: Side
    features: int = 1
    elements: int = 1

    def size(self, features: int) -> int:
        """Return the number of elements for `features` features."""
        return math.ceil(features / self.features) * self.elements


OUT, IN = Axis("out"), Axis("in")
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Parameter:
    """One of a layer's tensors.

    In the checkpoint each part has its own tensor with `axes`. In memory the parts are concatenated
    along the axis of the outputs. If there is none (a scale for the whole tensor, an order of the
    inputs) they are stacked along a new first axis, `[num_parts, …]`, even if there is only one
    part.
    """

    axes: tuple[Axis | int, ...]
    """Axes of the tensor. An integer is an axis of that length in every part and shard."""
    dtype: str
    scale: Scale | None = None
    """Allowed values if weights or inputs are multiplied by the tensor. `check` raises an error for
    any other value."""

    def part_shape(self, layer: LinearLayer, part: int) -> tuple[int, ...]:
        """Return the shape in the checkpoint (of a layer that is not sharded)."""
        sizes = {"out": layer.parts[part].out_features, "in": layer.in_features}
        return tuple(
            axis if isinstance(axis, int) else axis.size(sizes[axis.side]) for axis in self.axes
        )

    def shape(self, layer: LinearLayer) -> tuple[int, ...]:
        """Return the shape in memory."""
        shapes = [self.part_shape(layer, i) for i in range(len(layer.parts))]
        if self._out is None:
            return (len(shapes), *shapes[0])
        return (
            *shapes[0][: self._out],
            sum(s[self._out] for s in shapes),
            *shapes[0][self._out + 1 :],
        )

    def part_index(self, layer: LinearLayer, part: int) -> Index:
        """Return the index of a part in the tensor in memory."""
        if self._out is None:
            return (part,)
        sizes = [self.part_shape(layer, i)[self._out] for i in range(part + 1)]
        return (*[slice(None)] * self._out, slice(sum(sizes) - sizes[-1], sum(sizes)))

    def shard_index(self, layer: LinearLayer, part: int, side: Side, rank: int, size: int) -> Index:
        """Return the index of what a rank reads of a part's tensor in the checkpoint; `layer` is
        the whole layer.

        Raises `ValueError` if the shard would begin or end within an element, or if no axis
        belongs to the side.
        """
        features = layer.in_features if side == "in" else layer.parts[part].out_features
        share = features // size
        index: list[int | slice] = []
        for axis in self.axes:
            if isinstance(axis, int) or axis.side != side:
                index.append(slice(None))
                continue
            if features % size or share % axis.features:
                raise ValueError(
                    f"{layer.parts[part].name}: {features} {side}puts, stored in units of"
                    f" {axis.features}, cannot be shared by {size} ranks"
                )
            index.append(slice(axis.size(rank * share), axis.size((rank + 1) * share)))
        return tuple(index)

    def check(self, name: str, tensor: Array) -> None:
        """Raise `CheckpointError` if a scale has a value that is not allowed. `name` is the full
        name of the torch tensor. Called for each tensor of a scheme that is read from a checkpoint
        or returned by `quantize`."""
        if self.scale is None:
            return
        values = tensor.float()
        bad = (
            ~values.isfinite()
            | {"not zero": values == 0, "not negative": values < 0, "positive": values <= 0}[
                self.scale
            ]
        )
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            wrong = {"not zero": "zero", "not negative": "negative", "positive": "zero, negative"}[
                self.scale
            ]
            raise CheckpointError(
                f"{name} has the value {float(values[first])} at {list(first)}, and"
                f" {int(bad.sum())} of its {bad.numel()} scales are {wrong}, infinite or NaN: the"
                " checkpoint is damaged or its quantization failed; download or quantize it again"
            )

    @property
    def _out(self) -> int | None:
        places = [
            i
            for i, axis in enumerate(self.axes)
            if not isinstance(axis, int) and axis.side == "out"
        ]
        return places[0] if places else None


@dataclass(frozen=True)
class Declined:
    """The reason why a scheme leaves a layer unquantized."""

    reason: str


class Scheme(Protocol):
    """The object that a quantization provider builds; one object per engine and rule.
    `context.model.quantization_config` is the quantization config of the checkpoint."""

    unused: tuple[str, ...]
    """Globs for tensors that a checkpoint may contain and the scheme does not read."""

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        """Return the layer's tensors, or why the layer stays unquantized. The keys are the tensor
        names without the part's name ("qweight" of "….down_proj.qweight"). The bias is not among
        them; it is never quantized.

        Raises `CheckpointError` if the layer is quantized according to the checkpoint, but the
        scheme does not support it.
        """

    def linear(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> Callable[[Array], Array]:
        """Build the callable for `x [T, in]` → `[T, out]`, a new array of the dtype of x. Called
        once, with all tensors loaded. Rows of x are contiguous; the row stride is arbitrary.

        `tensors` has the declared tensors, by the same names, on the layer's device, and "bias"
        `[out]` if the layer has one. The callable may hold them, or a converted form, as long as it
        lives.
        """

    def kv_scales(self, name: str) -> dict[str, Parameter] | None:
        """Return the checkpoint's scales of an attention layer's keys and values, or None if it has
        none. `name` is the attention module ("model.layers.3.self_attn"). The tensors have one
        element; they are given by full name, the keys' scale first. They are read if the KV cache
        has dtype "float8_e4m3fn", and otherwise ignored.
        """

    def nbytes(self, layer: LinearLayer) -> int:
        """Return the bytes of the layer's weights in memory, without its bias."""

    def dequantize(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> Array:
        """Return the weight that the tensors represent, `f32[out, in]`. Slow and obviously correct:
        the reference for `linear`."""

    def quantize(self, layer: LinearLayer, weight: Array) -> dict[str, Array]:
        """Quantize a plain weight `[out, in]` of one part, contiguous, of any floating-point type.
        Returns tensors in the checkpoint's shapes.

        Called only if `on_the_fly` is declared.
        """
