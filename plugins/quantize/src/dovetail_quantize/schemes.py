"""The schemes by name: how each rounds a decoder layer's linear layers, and what it writes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dovetail.errors import ConfigError
from dovetail_quantize import awq, formats
from dovetail_quantize.gptq import round_in_sequence
from dovetail_quantize.inputs import Inputs
from dovetail_quantize.rounding import FP8, Grid, Rounded, RowGrid, inputs_by_token

VERSION = "0.1.0"


@dataclass(frozen=True)
class RoundedLayer:
    """A decoder layer, rounded. The module's weights are then what the tensors stand for."""

    tensors: dict[str, Tensor]
    """By name within the layer: "mlp.up_proj.qweight"."""
    errors: dict[str, float]
    """By linear layer: the error of its outputs, relative to them; of its weights, where nothing
    was measured."""


class Scheme(Protocol):
    """What `--scheme` names."""

    @property
    def calibrates(self) -> bool:
        """It measures activations."""

    @property
    def round_inputs(self) -> Callable[[Tensor], Tensor] | None:
        """What a linear layer of this scheme does to its inputs before it multiplies, x [..., in];
        None: nothing."""

    def check(self, name: str, linear: nn.Linear) -> None:
        """Raise `ConfigError` for a layer that the format cannot hold. Weights may be on the meta
        device."""

    def nbytes(self, linear: nn.Linear) -> int:
        """Of a linear layer's tensors in the checkpoint, its bias aside."""

    def round(
        self,
        layer: nn.Module,
        linears: Mapping[str, nn.Linear],
        inputs: Mapping[str, Inputs],
        dtype: torch.dtype,
        probe: Callable[[], Tensor] | None = None,
    ) -> RoundedLayer:
        """Round a decoder layer's linear layers, in place. `inputs` is empty if nothing was
        measured; `dtype` is the checkpoint's; `probe` runs the layer, as it then is, on some of the
        text."""

    def config(self, ignore: list[str]) -> dict[str, Any]:
        """quantization_config of the model's config.json. `ignore`: linear layers that stay as they
        are."""


@dataclass(frozen=True)
class ByRow:
    """FP8 and INT8: weights by output, inputs by token while the model runs. Written as
    compressed-tensors.

    Weights are rounded in sequence, as GPTQ does, where there is a text to measure on; else to
    nearest.
    """

    codes: torch.dtype
    calibrates: bool
    weight_only: bool
    """Inputs are taken as they are."""
    damp: float = 0.01

    @property
    def round_inputs(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.weight_only else partial(inputs_by_token, codes=self.codes)

    def check(self, name: str, linear: nn.Linear) -> None:
        """Every shape will do."""

    def nbytes(self, linear: nn.Linear) -> int:
        return linear.out_features * (linear.in_features + 2)

    def round(
        self,
        layer: nn.Module,
        linears: Mapping[str, nn.Linear],
        inputs: Mapping[str, Inputs],
        dtype: torch.dtype,
        probe: Callable[[], Tensor] | None = None,
    ) -> RoundedLayer:
        grid = RowGrid(self.codes, dtype)
        # One scale a row whatever the order, so that the best one costs nothing.
        found = _in_sequence(linears, inputs, grid, True, self.damp) if inputs else None
        return _each(
            linears,
            inputs,
            lambda name, weight: grid.round(weight) if found is None else found[name],
            lambda rounded: formats.compressed_tensors(rounded, dtype),
        )

    def config(self, ignore: list[str]) -> dict[str, Any]:
        return formats.compressed_tensors_config(self.codes, self.weight_only, ignore)


@dataclass(frozen=True)
class InGroups:
    """AWQ and GPTQ."""

    name: str
    grid: Grid
    nearest: bool
    """Neither scales nor makes up for errors."""
    desc_act: bool = False
    damp: float = 0.01
    round_inputs: Callable[[Tensor], Tensor] | None = field(default=None, init=False)

    @property
    def calibrates(self) -> bool:
        return not self.nearest

    def check(self, name: str, linear: nn.Linear) -> None:
        size, per_word = self.grid.size(linear.in_features), 32 // self.grid.bits
        if linear.in_features % size:
            raise ConfigError(
                f"--group-size {size}: the {linear.in_features} inputs of {name} are no multiple"
                " of it"
            )
        for what, features in (("inputs", linear.in_features), ("outputs", linear.out_features)):
            if features % per_word:
                raise ConfigError(
                    f"--scheme {self.name}: {features} {what} of {name} do not fill words of"
                    f" {per_word} codes"
                )

    def nbytes(self, linear: nn.Linear) -> int:
        groups = linear.in_features // self.grid.size(linear.in_features)
        codes = linear.in_features * linear.out_features + groups * linear.out_features
        return (
            codes * self.grid.bits // 8
            + 2 * groups * linear.out_features
            + (4 * linear.in_features)
        )

    def round(
        self,
        layer: nn.Module,
        linears: Mapping[str, nn.Linear],
        inputs: Mapping[str, Inputs],
        dtype: torch.dtype,
        probe: Callable[[], Tensor] | None = None,
    ) -> RoundedLayer:
        to_file = formats.awq if self.name == "awq" else partial(formats.gptq, grid=self.grid)
        if self.nearest:
            return _each(linears, inputs, lambda name, weight: self.grid.round(weight), to_file)
        if self.name == "awq":
            before = probe() if probe is not None else None
            given = awq.fold_scales(layer, linears, inputs, self.grid)
            if before is not None and probe is not None:
                awq.check_fold(before, probe())
            return _each(
                linears,
                given,
                lambda name, weight: self.grid.round(
                    weight, awq.group_error(given[name], self.grid.size(weight.shape[1]))
                ),
                to_file,
            )
        rounded = _in_sequence(linears, inputs, self.grid, self.desc_act, self.damp)
        return _each(linears, inputs, lambda name, weight: rounded[name], to_file)

    def config(self, ignore: list[str]) -> dict[str, Any]:
        if self.name == "awq":
            return formats.awq_config(self.grid, VERSION)
        return formats.gptq_config(self.grid, self.desc_act, self.damp, VERSION)


def _in_sequence(
    linears: Mapping[str, nn.Linear],
    inputs: Mapping[str, Inputs],
    grid: Grid | RowGrid,
    desc_act: bool,
    damp: float,
) -> dict[str, Rounded]:
    """Layers that have one input together: one Hessian is theirs, and with desc_act they need one
    order of their inputs to be computed as one."""
    found: dict[str, Rounded] = {}
    for sharing in {i.shared_by for i in inputs.values()}:
        whole = torch.cat([linears[name].weight.data for name in sharing])
        made = round_in_sequence(whole, inputs[sharing[0]].gram, grid, desc_act=desc_act, damp=damp)
        begin = 0
        for name in sharing:
            end = begin + linears[name].out_features
            found[name], begin = made.rows(begin, end), end
    return found


def _each(
    linears: Mapping[str, nn.Linear],
    inputs: Mapping[str, Inputs],
    round: Callable[[str, Tensor], Rounded],
    to_file: Callable[[Rounded], dict[str, Tensor]],
) -> RoundedLayer:
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name, linear in linears.items():
        weight = linear.weight.data
        rounded = round(name, weight)
        kept = rounded.weight()
        errors[name] = _relative_error(kept - weight, weight, inputs.get(name))
        linear.weight.data = kept
        tensors.update({f"{name}.{key}": tensor for key, tensor in to_file(rounded).items()})
    return RoundedLayer(tensors, errors)


def _relative_error(difference: Tensor, weight: Tensor, inputs: Inputs | None) -> float:
    if inputs is None:
        return float(difference.norm() / weight.norm().clamp_min(1e-30))
    return math.sqrt(
        max(inputs.output_error(difference), 0.0) / max(inputs.output_error(weight), 1e-30)
    )


def make_scheme(
    name: str,
    *,
    has_text: bool,
    weight_only: bool,
    bits: int,
    group_size: int,
    nearest: bool,
    desc_act: bool,
    asymmetric: bool,
    damp: float,
) -> Scheme:
    """Raises `ConfigError` for a name that is unknown, and for options that the scheme does not
    have."""
    known = ("fp8", "int8", "awq", "gptq")
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"--scheme {name!r} is unknown.{hint} There are {', '.join(known)}")
    takes_bits = {"awq": (4,), "gptq": (4, 8)}.get(name, (bits,))
    if bits not in takes_bits:
        raise ConfigError(f"--bits {bits}: {name} has {' and '.join(map(str, takes_bits))}")
    for option, given, takers in (
        ("--desc-act", desc_act, ("gptq",)),
        ("--asymmetric", asymmetric, ("gptq",)),
        ("--group-size", group_size != 128, ("awq", "gptq")),
        ("--weight-only", weight_only, ("fp8",)),
        ("--bits", bits != 4, ("gptq",)),
    ):
        if given and name not in takers:
            raise ConfigError(f"{option} is for {' and '.join(takers)}, not for {name}")
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"--group-size {group_size}: it is at least 1, or -1 for all inputs")
    if not 0 < damp < 1:
        raise ConfigError(f"--damp {damp} is no share between 0 and 1")
    if name in ("fp8", "int8"):
        return ByRow(
            FP8 if name == "fp8" else torch.int8, has_text and not nearest, weight_only, damp
        )
    if desc_act and nearest:
        raise ConfigError(
            "--desc-act orders what is rounded in sequence: it does not go with --nearest"
        )
    grid = Grid(bits, group_size, symmetric=name == "gptq" and not asymmetric)
    return InGroups(name, grid, nearest, desc_act, damp)
