"""Parse a checkpoint's quantization_config: `config_groups`, each with its targets, and
`ignore`."""

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
"""Type and numbers of bits of the weights by format. Unpacked weights have one byte each."""
STRATEGIES = ("tensor", "channel", "group", "block")
ALL = "Linear"
"""The target that matches every linear layer."""


@dataclass(frozen=True)
class Group:
    """Quantization settings of the layers in one config group."""

    format: str
    bits: int
    strategy: str
    group_size: int | None
    """Number of inputs that share a scale; None means all."""
    block: tuple[int, int] | None
    """Numbers of outputs and inputs that share a scale."""
    symmetric: bool
    ordered: bool
    """True if the inputs of a group are not contiguous (`actorder: group`); `weight_g_idx` has the
    group of each input."""
    inputs: Inputs | None
    static: bool
    """True if the scale of the inputs is in the checkpoint."""

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
        """Parse one group. `where` is the path of the file, and `default` is the format of the
        whole config. Raises `CheckpointError` for unsupported settings."""

        def unsupported(key: str, given: object, what: str) -> CheckpointError:
            return CheckpointError(
                f"{where}: quantization_config.config_groups.{name}.{key} is {given!r}; {what}"
            )

        weights = entry.get("weights")
        if not isinstance(weights, dict):
            raise unsupported("weights", weights, "a group must describe its weights")
        bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        format = entry.get("format") or default
        if format == NAIVE:
            format = FLOAT if kind == "float" else INT
        if format not in KINDS:
            raise unsupported("format", format, f"supported: {', '.join(KINDS)} and {NAIVE}")
        wanted, sizes = KINDS[format]
        if kind != wanted or bits not in sizes:
            shown = " or ".join(map(str, sizes))
            raise unsupported(
                "weights",
                f"{kind} of {bits} bits",
                f"{format} is supported with {wanted} of {shown} bits",
            )
        strategy = weights.get("strategy") or (
            "channel" if weights.get("group_size") == -1 else "tensor"
        )
        if strategy not in STRATEGIES or (strategy == "block" and format != FLOAT):
            raise unsupported(
                "weights.strategy",
                strategy,
                f"{format} supports {', '.join(STRATEGIES[: 3 + (format == FLOAT)])}",
            )
        size = weights.get("group_size") if strategy == "group" else None
        if strategy == "group" and (not isinstance(size, int) or size < 1):
            raise unsupported("weights.group_size", size, "it must be a number of inputs")
        symmetric = weights.get("symmetric", True)
        if not symmetric and (format == FLOAT or strategy == "tensor"):
            raise unsupported(
                "weights.symmetric",
                symmetric,
                f"zero points are not supported for {format} with the strategy {strategy}",
            )
        if entry.get("output_activations"):
            raise unsupported(
                "output_activations",
                entry["output_activations"],
                "quantized outputs are not supported",
            )
        inputs, static = _inputs_of(entry.get("input_activations"), wanted, unsupported)
        return cls(
            format,
            bits,
            strategy,
            size,
            _block_of(weights, unsupported) if strategy == "block" else None,
            symmetric,
            weights.get("actorder") in ("group", "dynamic"),
            inputs,
            static,
        )


def _inputs_of(given: Any, wanted: str, unsupported: Any) -> tuple[Inputs | None, bool]:
    """Return the type to which inputs are rounded, and whether their scale is in the checkpoint.

    Only symmetric scales per row or for the whole tensor are implemented. Inputs that the
    checkpoint quantizes in another way (in groups of 128, as block-wise weights come with, or with
    zero points) are not rounded, which is more accurate.
    """
    if not given:
        return None, False
    if given.get("num_bits", 8) != 8 or given.get("type", "int") != wanted:
        what = f"{given.get('type', 'int')} of {given.get('num_bits', 8)} bits"
        raise unsupported(
            "input_activations",
            what,
            f"with these weights it must be {wanted} of 8 bits, or absent",
        )
    if given.get("strategy", "tensor") not in ("token", "tensor") or not given.get(
        "symmetric", True
    ):
        return None, False
    return "int8" if wanted == "int" else "float8_e4m3fn", not given.get("dynamic", False)


def _block_of(weights: Config, unsupported: Any) -> tuple[int, int]:
    block = weights.get("block_structure") or [128, 128]
    if isinstance(block, str):
        block = [int(n) if n.isdigit() else 0 for n in block.split("x")]
    if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise unsupported(
            "weights.block_structure",
            weights.get("block_structure"),
            "it must be two numbers: outputs and inputs",
        )
    return block[0], block[1]


class Groups:
    """The groups of a checkpoint. Finds the group of a layer."""

    def __init__(self, where: str, config: Config) -> None:
        default, entries = config.get("format", PACKED), config.get("config_groups")
        if not isinstance(entries, dict) or not entries:
            raise CheckpointError(
                f"{where}: quantization_config.config_groups is {entries!r}; it must have a group"
                " for every kind of layer"
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
        """Return the group of a layer, or None if the layer is not quantized."""
        if any(_matches(pattern, name) for pattern in self._ignored):
            return None
        # A name or a pattern takes precedence over "Linear".
        named = [
            group
            for targets, group in self.all
            if any(_matches(t, name) for t in targets if t != ALL)
        ]
        return next(iter([*named, *(group for targets, group in self.all if ALL in targets)]), None)


def _matches(pattern: str, name: str) -> bool:
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name
