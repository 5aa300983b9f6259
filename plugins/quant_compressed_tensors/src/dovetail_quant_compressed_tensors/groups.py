"""What a checkpoint's quantization_config says of its layers: `config_groups`, each with its
targets, and `ignore`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dovetail.errors import CheckpointError
from dovetail.interfaces.matmul import Codes, Inputs

Config = Mapping[str, Any]

FLOAT, INT, PACKED, NAIVE = "float-quantized", "int-quantized", "pack-quantized", "naive-quantized"
KINDS = {FLOAT: ("float", (8,)), INT: ("int", (4, 8)), PACKED: ("int", (4, 8))}
"""By format: the type of the weights, and of how many bits. Not packed, each has a byte of its
own."""
STRATEGIES = ("tensor", "channel", "group", "block")
ALL = "Linear"
"""As a target: every linear layer."""


@dataclass(frozen=True)
class Group:
    """What the configuration says of some layers."""

    format: str
    bits: int
    strategy: str
    group_size: int | None
    """Inputs that share a scale; None: all."""
    block: tuple[int, int] | None
    """Outputs and inputs that share a scale."""
    symmetric: bool
    ordered: bool
    """Groups are of inputs that lie apart (`actorder: group`), as `weight_g_idx` says."""
    inputs: Inputs | None
    static: bool
    """The scale of the inputs is in the checkpoint."""

    @property
    def codes(self) -> Codes:
        return (
            "float8_e4m3fn"
            if self.format == FLOAT
            else "uint4"
            if self.format == PACKED and self.bits == 4
            else "int8"
        )

    @classmethod
    def of(cls, where: str, name: str, entry: Config, default: str) -> Group:
        """Raises `CheckpointError` for what is not supported. `where` is the file, `default` the
        format that the whole config names."""

        def refused(key: str, given: object, what: str) -> CheckpointError:
            return CheckpointError(
                f"{where}: quantization_config.config_groups.{name}.{key} is {given!r}; {what}"
            )

        weights = entry.get("weights")
        if not isinstance(weights, dict):
            raise refused("weights", weights, "a group must say how its weights are stored")
        bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        format = entry.get("format") or default
        if format == NAIVE:
            format = FLOAT if kind == "float" else INT
        if format not in KINDS:
            raise refused("format", format, f"this reads {', '.join(KINDS)} and {NAIVE}")
        wanted, sizes = KINDS[format]
        if kind != wanted or bits not in sizes:
            shown = " or ".join(map(str, sizes))
            raise refused(
                "weights",
                f"{kind} of {bits} bits",
                f"{format} is read with {wanted} of {shown} bits",
            )
        strategy = weights.get("strategy") or (
            "channel" if weights.get("group_size") == -1 else "tensor"
        )
        if strategy not in STRATEGIES or (strategy == "block" and format != FLOAT):
            raise refused(
                "weights.strategy",
                strategy,
                f"{format} is read by {', '.join(STRATEGIES[: 3 + (format == FLOAT)])}",
            )
        size = weights.get("group_size") if strategy == "group" else None
        if strategy == "group" and (not isinstance(size, int) or size < 1):
            raise refused("weights.group_size", size, "it must be a number of inputs")
        symmetric = weights.get("symmetric", True)
        if not symmetric and (format == FLOAT or strategy == "tensor"):
            raise refused(
                "weights.symmetric",
                symmetric,
                f"{format} is read without zero points with the strategy {strategy}",
            )
        if entry.get("output_activations"):
            raise refused(
                "output_activations", entry["output_activations"], "outputs are not rounded here"
            )
        inputs, static = _inputs_of(entry.get("input_activations"), wanted, refused)
        return cls(
            format,
            bits,
            strategy,
            size,
            _block_of(weights, refused) if strategy == "block" else None,
            symmetric,
            weights.get("actorder") in ("group", "dynamic"),
            inputs,
            static,
        )


def _inputs_of(given: Any, wanted: str, refused: Any) -> tuple[Inputs | None, bool]:
    """What inputs are rounded to, and whether by a scale from the checkpoint.

    Inputs that tools round otherwise than by a row's or the tensor's own symmetric scale (in groups
    of 128, as block scales come with, or with zero points) are taken as they are, which is nearer
    to the weights' own accuracy.
    """
    if not given:
        return None, False
    if given.get("num_bits", 8) != 8 or given.get("type", "int") != wanted:
        what = f"{given.get('type', 'int')} of {given.get('num_bits', 8)} bits"
        raise refused(
            "input_activations", what, f"beside these weights it is {wanted} of 8 bits, or nothing"
        )
    if given.get("strategy", "tensor") not in ("token", "tensor") or not given.get(
        "symmetric", True
    ):
        return None, False
    return "int8" if wanted == "int" else "float8_e4m3fn", not given.get("dynamic", False)


def _block_of(weights: Config, refused: Any) -> tuple[int, int]:
    block = weights.get("block_structure") or [128, 128]
    if isinstance(block, str):
        block = [int(n) if n.isdigit() else 0 for n in block.split("x")]
    if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise refused(
            "weights.block_structure",
            weights.get("block_structure"),
            "it must be two numbers: outputs and inputs",
        )
    return block[0], block[1]


class Groups:
    """Which group a layer is of."""

    def __init__(self, where: str, config: Config) -> None:
        default, entries = config.get("format", PACKED), config.get("config_groups")
        if not isinstance(entries, dict) or not entries:
            raise CheckpointError(
                f"{where}: quantization_config.config_groups is {entries!r}; it must say how layers"
                " are stored, by group"
            )
        for key in ("sparsity_config", "transform_config"):
            if any(
                (config.get(key) or {}).get(inner) not in (None, "dense", {}, [])
                for inner in ("format", "config_groups")
            ):
                raise CheckpointError(
                    f"{where}: quantization_config.{key} is {config[key]!r}; it is not supported"
                )
        self.all = [
            (entry.get("targets", [ALL]), Group.of(where, n, entry, default))
            for n, entry in entries.items()
        ]
        self._ignored: list[str] = config.get("ignore") or []

    def of(self, name: str) -> Group | None:
        """None: the checkpoint leaves the layer as it is."""
        if any(_matches(pattern, name) for pattern in self._ignored):
            return None
        # A name or a pattern says more than "Linear".
        named = [
            group
            for targets, group in self.all
            if any(_matches(t, name) for t in targets if t != ALL)
        ]
        return next(iter([*named, *(group for targets, group in self.all if ALL in targets)]), None)


def _matches(pattern: str, name: str) -> bool:
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name
