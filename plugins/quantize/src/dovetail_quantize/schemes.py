"""Define the quantization schemes: how each quantizes a decoder layer's linear layers, and what it
writes."""

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
from dovetail_quantize.gptq import gptq_quantize
from dovetail_quantize.inputs import Inputs
from dovetail_quantize.rounding import (
    FP8,
    Grid,
    PerChannelGrid,
    QuantizedWeight,
    fake_quantize_per_token,
)

VERSION = "0.1.0"


@dataclass(frozen=True)
class QuantizedLayer:
    """The quantized tensors of a decoder layer. The module's weights are replaced by the
    dequantized ones."""

    tensors: dict[str, Tensor]
    """Tensors by name within the layer, such as "mlp.up_proj.qweight"."""
    errors: dict[str, float]
    """Relative error of the outputs of each linear layer; of its weights, if no activations were
    measured."""


class Scheme(Protocol):
    """A quantization scheme, selected by `--scheme`."""

    @property
    def calibrates(self) -> bool:
        """True if the scheme needs measured activations."""

    @property
    def round_inputs(self) -> Callable[[Tensor], Tensor] | None:
        """Quantizes and dequantizes the inputs x [..., in] of a linear layer as the scheme does at
        run time. None if inputs are not quantized."""

    def check(self, name: str, linear: nn.Linear) -> None:
        """Raise `ConfigError` for a layer that the format cannot represent. Weights may be on the
        meta device."""

    def nbytes(self, linear: nn.Linear) -> int:
        """Return the number of bytes of a linear layer's tensors in the checkpoint, without its
        bias."""

    def round(
        self,
        layer: nn.Module,
        linears: Mapping[str, nn.Linear],
        inputs: Mapping[str, Inputs],
        dtype: torch.dtype,
        probe: Callable[[], Tensor] | None = None,
    ) -> QuantizedLayer:
        """Quantize a decoder layer's linear layers in place.

        `inputs` is empty if nothing was measured, `dtype` is the checkpoint's, and `probe` runs the
        layer in its current state on part of the text.
        """

    def config(self, ignore: list[str]) -> dict[str, Any]:
        """Return the quantization_config for config.json. `ignore` lists linear layers that are not
        quantized."""


@dataclass(frozen=True)
class PerChannelScheme:
    """FP8 and INT8: weights per channel, activations dynamically per token. Written as
    compressed-tensors.

    Weights are quantized by the GPTQ algorithm if there is calibration text, and rounded to nearest
    otherwise.
    """

    codes: torch.dtype
    calibrates: bool
    weight_only: bool
    """If true, activations are not quantized."""
    damp: float = 0.01

    @property
    def round_inputs(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.weight_only else partial(fake_quantize_per_token, codes=self.codes)

    def check(self, name: str, linear: nn.Linear) -> None:
        """Accept every shape."""

    def nbytes(self, linear: nn.Linear) -> int:
        return linear.out_features * (linear.in_features + 2)

    def round(
        self,
        layer: nn.Module,
        linears: Mapping[str, nn.Linear],
        inputs: Mapping[str, Inputs],
        dtype: torch.dtype,
        probe: Callable[[], Tensor] | None = None,
    ) -> QuantizedLayer:
        grid = PerChannelGrid(self.codes, dtype)
        # There is one scale per row whatever the order, so the best order costs nothing in the
        # format.
        results = _gptq_quantize_layers(linears, inputs, grid, True, self.damp) if inputs else None
        return _replace_weights(
            linears,
            inputs,
            lambda name, weight: grid.round(weight) if results is None else results[name],
            lambda rounded: formats.compressed_tensors(rounded, dtype),
        )

    def config(self, ignore: list[str]) -> dict[str, Any]:
        return formats.compressed_tensors_config(self.codes, self.weight_only, ignore)


@dataclass(frozen=True)
class GroupwiseScheme:
    """AWQ and GPTQ: weights per group of inputs."""

    name: str
    grid: Grid
    nearest: bool
    """If true, rounds to nearest, without AWQ's scales or GPTQ's error compensation."""
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
                f"--group-size {size}: the {linear.in_features} inputs of {name} are not a multiple"
                " of it"
            )
        for kind, features in (("inputs", linear.in_features), ("outputs", linear.out_features)):
            if features % per_word:
                raise ConfigError(
                    f"--scheme {self.name}: {features} {kind} of {name} are not a multiple of"
                    f" {per_word}, the number of codes per word"
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
    ) -> QuantizedLayer:
        to_file = formats.awq if self.name == "awq" else partial(formats.gptq, grid=self.grid)
        if self.nearest:
            return _replace_weights(
                linears, inputs, lambda name, weight: self.grid.round(weight), to_file
            )
        if self.name == "awq":
            before = probe() if probe is not None else None
            scaled = awq.fold_scales(layer, linears, inputs, self.grid)
            if before is not None and probe is not None:
                awq.check_fold(before, probe())
            return _replace_weights(
                linears,
                scaled,
                lambda name, weight: self.grid.round(
                    weight, awq.group_error(scaled[name], self.grid.size(weight.shape[1]))
                ),
                to_file,
            )
        rounded = _gptq_quantize_layers(linears, inputs, self.grid, self.desc_act, self.damp)
        return _replace_weights(linears, inputs, lambda name, weight: rounded[name], to_file)

    def config(self, ignore: list[str]) -> dict[str, Any]:
        if self.name == "awq":
            return formats.awq_config(self.grid, VERSION)
        return formats.gptq_config(self.grid, self.desc_act, self.damp, VERSION)


def _gptq_quantize_layers(
    linears: Mapping[str, nn.Linear],
    inputs: Mapping[str, Inputs],
    grid: Grid | PerChannelGrid,
    desc_act: bool,
    damp: float,
) -> dict[str, QuantizedWeight]:
    """Quantize linear layers that share an input together: they share the Hessian, and with
    desc_act they need the same order of inputs to be computed as one."""
    results: dict[str, QuantizedWeight] = {}
    for sharing in {i.shared_by for i in inputs.values()}:
        concatenated = torch.cat([linears[name].weight.data for name in sharing])
        quantized = gptq_quantize(
            concatenated, inputs[sharing[0]].gram, grid, desc_act=desc_act, damp=damp
        )
        begin = 0
        for name in sharing:
            end = begin + linears[name].out_features
            results[name], begin = quantized.rows(begin, end), end
    return results


def _replace_weights(
    linears: Mapping[str, nn.Linear],
    inputs: Mapping[str, Inputs],
    round: Callable[[str, Tensor], QuantizedWeight],
    to_file: Callable[[QuantizedWeight], dict[str, Tensor]],
) -> QuantizedLayer:
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name, linear in linears.items():
        weight = linear.weight.data
        rounded = round(name, weight)
        dequantized = rounded.dequantize()
        errors[name] = _relative_error(dequantized - weight, weight, inputs.get(name))
        linear.weight.data = dequantized
        tensors.update({f"{name}.{key}": tensor for key, tensor in to_file(rounded).items()})
    return QuantizedLayer(tensors, errors)


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
    """Return the scheme of that name. Raises `ConfigError` for an unknown name, and for options
    that the scheme does not have."""
    known = ("fp8", "int8", "awq", "gptq")
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"--scheme {name!r} is unknown.{hint} Known schemes: {', '.join(known)}")
    supported_bits = {"awq": (4,), "gptq": (4, 8)}.get(name, (bits,))
    if bits not in supported_bits:
        raise ConfigError(
            f"--bits {bits}: {name} supports {' and '.join(map(str, supported_bits))}"
        )
    for option, is_set, schemes in (
        ("--desc-act", desc_act, ("gptq",)),
        ("--asymmetric", asymmetric, ("gptq",)),
        ("--group-size", group_size != 128, ("awq", "gptq")),
        ("--weight-only", weight_only, ("fp8",)),
        ("--bits", bits != 4, ("gptq",)),
    ):
        if is_set and name not in schemes:
            raise ConfigError(f"{option} is an option of {' and '.join(schemes)}, not of {name}")
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"--group-size {group_size}: must be at least 1, or -1 for all inputs")
    if not 0 < damp < 1:
        raise ConfigError(f"--damp {damp}: must be between 0 and 1")
    if name in ("fp8", "int8"):
        return PerChannelScheme(
            FP8 if name == "fp8" else torch.int8, has_text and not nearest, weight_only, damp
        )
    if desc_act and nearest:
        raise ConfigError(
            "--desc-act sets the order of the GPTQ algorithm and cannot be combined with --nearest"
        )
    grid = Grid(bits, group_size, symmetric=name == "gptq" and not asymmetric)
    return GroupwiseScheme(name, grid, nearest, desc_act, damp)
