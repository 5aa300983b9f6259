"""Quantization: how the weights of linear layers are stored, and how they are multiplied.

A scheme answers for each linear layer with the tensors that it keeps (`parameters`), or with the
reason why the layer stays as it is. From that declaration follow, the same for every scheme: which
of the checkpoint's tensors are read, where the parts of a fused layer (q, k and v) lie, and what a
shard of a layer holds. When a layer's tensors are complete, `linear` makes the callable that
multiplies.

A checkpoint may hold a layer as the scheme stores it, or as a plain weight, which goes through
`quantize` while it is read.
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
"""What a scale may be; an infinity or NaN never. "not zero": some tools write negative ones; "not
negative": where weights are all zero it is 0; "positive": inputs, keys or values are divided by
it."""


@dataclass(frozen=True)
class QuantizationCapabilities:
    """What a scheme can do, as data: the core refuses what is not declared, with the reason."""

    methods: tuple[str, ...] = ()
    """Checkpoints that it reads: `quant_method` of their quantization_config. `PLAIN` is one that
    is not quantized."""
    on_the_fly: bool = False
    """It can quantize plain weights while they are read."""
    framework: str = "torch"
    devices: tuple[str, ...] | None = ("cpu",)
    """None is any."""
    dtypes: tuple[str, ...] | None = ("float32", "bfloat16", "float16")
    """Of a layer's input and output. None is any."""
    activations: str | None = None
    """What a layer rounds its inputs to before it multiplies: "int8", "float8_e4m3fn"; None: it
    does not."""
    examples: tuple[dict[str, Any], ...] = ()
    """quantization_configs of checkpoints that it reads, one for each method at least: what
    conformance is tried with."""
    codes: tuple[str, ...] = ()
    """What it has multiplied by the matmul extension point: its `WeightFormat.codes`
    (interfaces/matmul.py). Empty: it multiplies by itself. Where a checkpoint or options ask for
    less than all of `codes` and `activations`, `Provider.needs` says so."""
    compiled_steps: bool = False
    """Its layers are `CompiledLinear`s: they can be part of a compiled step
    (interfaces/compiled.py), if those that the matmul extension point makes for it are."""


@dataclass(frozen=True)
class Part:
    """One of the checkpoint's layers that a fused layer is made of: `q_proj` of `qkv_proj`, by its
    full name."""

    name: str
    out_features: int


@dataclass(frozen=True)
class LinearLayer:
    """What is fixed for a linear layer: `x [T, in_features]` → `[T, out_features]`."""

    name: str
    """Full: "model.layers.3.mlp.down_proj"."""
    parts: tuple[Part, ...]
    """One after the other in the output. Mostly one, of the layer's name."""
    in_features: int
    bias: bool
    dtype: str
    """Of x, of the output and of the bias."""
    device: str = "cpu"
    stored: bool = True
    """The checkpoint holds the layer as the scheme stores it. Otherwise it holds a plain weight,
    for `quantize`."""

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    def part(self, index: int) -> LinearLayer:
        """One part as a layer of its own."""
        part = self.parts[index]
        return replace(self, name=part.name, parts=(part,))

    def shard(self, side: Side, rank: int, size: int) -> LinearLayer:
        """What one of `size` ranks holds: a share of each part's outputs, or of the inputs. Raises
        `ValueError`."""
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
        """`answer` for a part's name, which must be the same for all parts. Raises `ConfigError`
        that shows them.

        `what` says for the error what was asked, such as "the checkpoint's ignore list".
        """
        answers = {part.name: answer(part.name) for part in self.parts}
        first = next(iter(answers.values()))
        if any(a != first for a in answers.values()):
            listing = ", ".join(f"{name}: {a}" for name, a in answers.items())
            raise ConfigError(
                f"{what} must treat all parts of the fused layer {self.name} alike, and says"
                f" {listing}"
            )
        return first


def quantization_rule(plan: Plan, layer: LinearLayer) -> str:
    """The key of the plan's choice that counts for a layer. Raises `ConfigError` if parts of a
    fused layer differ."""
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

    `Axis("in", 8)` is eight 4-bit weights in an int32; `Axis("in", 128)` a scale for a group of 128
    inputs; `Axis("out", 128)` one for a block of 128 outputs, the last of which may be smaller.
    """

    side: Side
    features: int = 1
    elements: int = 1

    def size(self, features: int) -> int:
        """Elements that `features` features take."""
        return math.ceil(features / self.features) * self.elements


OUT, IN = Axis("out"), Axis("in")
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Parameter:
    """One of a layer's tensors.

    In the checkpoint each part has its own, of `axes`. In memory the parts lie one after the other
    along the axis of the outputs; where there is none (a scale for the whole tensor, an order of
    the inputs) they are stacked along a new first axis: `[num_parts, …]`, also where there is one
    part.
    """

    axes: tuple[Axis | int, ...]
    """A number is an axis of that length in every part and shard."""
    dtype: str
    scale: Scale | None = None
    """Weights or inputs are multiplied by it: a number that it may not be is an error, which
    `check` raises for the worker."""

    def part_shape(self, layer: LinearLayer, part: int) -> tuple[int, ...]:
        """In the checkpoint (of a layer that is not sharded)."""
        sizes = {"out": layer.parts[part].out_features, "in": layer.in_features}
        return tuple(
            axis if isinstance(axis, int) else axis.size(sizes[axis.side]) for axis in self.axes
        )

    def shape(self, layer: LinearLayer) -> tuple[int, ...]:
        """In memory."""
        shapes = [self.part_shape(layer, i) for i in range(len(layer.parts))]
        if self._out is None:
            return (len(shapes), *shapes[0])
        return (
            *shapes[0][: self._out],
            sum(s[self._out] for s in shapes),
            *shapes[0][self._out + 1 :],
        )

    def part_index(self, layer: LinearLayer, part: int) -> Index:
        """Where a part lies in memory."""
        if self._out is None:
            return (part,)
        sizes = [self.part_shape(layer, i)[self._out] for i in range(part + 1)]
        return (*[slice(None)] * self._out, slice(sum(sizes) - sizes[-1], sum(sizes)))

    def shard_index(self, layer: LinearLayer, part: int, side: Side, rank: int, size: int) -> Index:
        """What of a part's tensor in the checkpoint a rank reads; `layer` is the whole layer.

        Raises `ValueError` if the shard would begin or end within an element, or no axis says where
        the side's features lie.
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
        """Raise `CheckpointError` for a scale that is none. `name` is the torch tensor's, with its
        layer's. Called by who reads a checkpoint, for each tensor of a scheme, and by who has one
        quantized."""
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
                f"{name} holds {float(values[first])} at {list(first)}, and {int(bad.sum())} of its"
                f" {bad.numel()} scales are {wrong}, infinite or NaN: the checkpoint is damaged, or"
                " its quantization failed there; get it again, or quantize it again"
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
    """Why a scheme leaves a layer as it is."""

    reason: str


class Scheme(Protocol):
    """What a quantization provider builds: one object an engine and rule.
    `context.model.quantization_config` is what the checkpoint says of itself."""

    unused: tuple[str, ...]
    """Tensors that a checkpoint may hold and that the scheme does not read, as globs."""

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        """The layer's tensors, by what follows the part's name in the checkpoint ("qweight" of
        "….down_proj.qweight"); or why the layer stays as it is. The bias is not among them: it is
        always plain.

        Raises `CheckpointError` if the checkpoint says that the layer is quantized and the scheme
        cannot take it.
        """

    def linear(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> Callable[[Array], Array]:
        """Make `x [T, in]` → `[T, out]`, a new array of x's dtype. Called once, with all tensors
        complete. Rows of x are contiguous, and may lie apart.

        `tensors` are those declared, by the same names, on the layer's device, and "bias" `[out]`
        if the layer has one. The callable may keep them, or a form of its own, for as long as it
        lives.
        """

    def kv_scales(self, name: str) -> dict[str, Parameter] | None:
        """The checkpoint's scales of an attention layer's keys and values
        ("model.layers.3.self_attn"): tensors of one element, by full name, the keys' first. None:
        it has none. Read where the KV cache is of "float8_e4m3fn", else passed over.
        """

    def nbytes(self, layer: LinearLayer) -> int:
        """Bytes that the weights take once the layer is made, its bias aside."""

    def dequantize(self, layer: LinearLayer, tensors: Mapping[str, Array]) -> Array:
        """The weight that the tensors stand for, `f32[out, in]`: slow and obviously right, the
        reference of `linear`."""

    def quantize(self, layer: LinearLayer, weight: Array) -> dict[str, Array]:
        """The tensors of a plain weight `[out, in]`, contiguous, of any floating type: of one part,
        in the checkpoint's shapes.

        Only called if `on_the_fly` is declared.
        """
