"""The tensors of each format, and what they are in the canonical form.

| format | weight | scale | more |
|---|---|---|---|
| float-quantized | `weight f8_e4m3[out, in]` | `weight_scale [out, 1]`, `[1]` or `[out / 128, in / 128]` | `input_scale [1]` if static |
| int-quantized | `weight i8[out, in]` | `weight_scale [out, 1]`, `[1]` or `[out, in / group]` | the same |
| pack-quantized | `weight_packed i32[out, in * bits / 32]` | `weight_scale [out, in / group]` or `[out, 1]` | below |

Packed codes are unsigned, by half their range too large. `weight_zero_point i32[out * bits / 32, in / group]` is packed along the
outputs; `weight_shape i64[2]` says what the words cannot; `weight_g_idx i32[in]` is there where inputs were put in an order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.interfaces.matmul import Inputs, Matmul, MatmulScheme, WeightFormat
from dovetail.interfaces.quantization import IN, OUT, Axis, Declined, LinearLayer, Parameter

INPUTS: dict[str, Inputs] = {"float-quantized": "float8_e4m3fn", "int-quantized": "int8"}
PACKED = "pack-quantized"


@dataclass(frozen=True)
class Group:
    """What the configuration says of some layers."""

    format: str
    bits: int
    strategy: str
    group_size: int | None
    """Inputs that share a scale; None: all."""
    block: tuple[int, int] | None
    symmetric: bool
    ordered: bool
    inputs: Inputs | None
    static: bool
    """The scale of the inputs is in the checkpoint."""

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any], default: str) -> Group:
        """Raises `CheckpointError` for what is not supported."""

        def refuse(what: str, given: object, known: str) -> CheckpointError:
            return CheckpointError(f"quantization_config: config_groups.{name}: {what} {given!r} is not supported; {known}")

        weights, inputs = entry.get("weights"), entry.get("input_activations")
        kind = entry.get("format") or default
        if weights is None:
            raise refuse("weights", weights, "a group says how its weights are stored")
        if kind not in (*INPUTS, PACKED):
            raise refuse("format", kind, f"{', '.join(INPUTS)} and {PACKED} are")
        bits, type_, strategy = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("strategy")
        allowed = {"float-quantized": ("float", (8,)), "int-quantized": ("int", (8,)), PACKED: ("int", (4, 8))}[kind]
        if type_ != allowed[0] or bits not in allowed[1]:
            raise refuse(f"{kind} with num_bits", f"{bits} ({type_})", f"it has {allowed[0]} of {allowed[1]} bits")
        if strategy not in ("tensor", "channel", "group", "block") or (strategy == "block") > (kind == "float-quantized"):
            raise refuse(f"{kind} with the strategy", strategy, "tensor, channel, group, and block for floats are")
        if entry.get("output_activations"):
            raise refuse("output_activations", entry["output_activations"], "outputs are not rounded")
        block = weights.get("block_structure")
        rounds, static = None, False
        # Inputs that are rounded in groups of 128, as block scales come with, are taken as they are, which is nearer.
        if inputs and inputs.get("strategy") in ("token", "tensor"):
            if kind == PACKED or inputs.get("num_bits", 8) != 8 or inputs.get("type", "int") != allowed[0]:
                raise refuse("input_activations", inputs, "inputs are rounded to what the weights are, or not at all")
            rounds, static = INPUTS[kind], not inputs.get("dynamic", False)
        return cls(
            kind, bits, strategy, weights.get("group_size") if strategy == "group" else None,
            tuple(block) if strategy == "block" and block else (128, 128) if strategy == "block" else None,
            weights.get("symmetric", True), weights.get("actorder") in ("group", "dynamic"), rounds, static,
        )  # fmt: skip


class CompressedTensors(MatmulScheme):
    """Layers of a checkpoint, each as its group says."""

    def __init__(self, matmul: Matmul, config: Mapping[str, Any]) -> None:
        super().__init__(matmul)
        default, groups = config.get("format", PACKED), config.get("config_groups") or {}
        if not groups:
            raise CheckpointError("quantization_config: compressed-tensors without config_groups says nothing of any layer")
        self._groups = [(entry.get("targets", ["Linear"]), Group.of(name, entry, default)) for name, entry in groups.items()]
        self._ignored: list[str] = config.get("ignore") or []
        self._kv: Mapping[str, Any] | None = config.get("kv_cache_scheme")

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        group = self._group(layer)
        if group is None:
            return Declined("the checkpoint leaves it out (ignore)")
        per_word = 32 // group.bits
        if group.format == PACKED:
            if layer.in_features % per_word:
                raise CheckpointError(f"{layer.name} cannot be read: its inputs are no multiple of {per_word}")
            found = {
                "weight_packed": Parameter((OUT, Axis("in", features=per_word)), "int32"),
                "weight_shape": Parameter((2,), "int64"),
            }
        else:
            found = {"weight": Parameter((OUT, IN), "int8" if group.format == "int-quantized" else "float8_e4m3fn")}
        scales = {
            "tensor": (1,), "channel": (OUT, 1), "group": (OUT, Axis("in", features=group.group_size or 1)),
            "block": (Axis("out", features=(group.block or (1, 1))[0]), Axis("in", features=(group.block or (1, 1))[1])),
        }  # fmt: skip
        found["weight_scale"] = Parameter(scales[group.strategy], "float32")
        if not group.symmetric:
            if group.format != PACKED:
                raise CheckpointError(f"{layer.name}: zero points of {group.format} weights are not supported")
            if odd := [p.name for p in layer.parts if p.out_features % per_word]:
                raise CheckpointError(f"{layer.name} cannot be read: the outputs of {odd[0]} are no multiple of {per_word}")
            groups = 1 if group.group_size is None else Axis("in", features=group.group_size)
            found["weight_zero_point"] = Parameter((Axis("out", features=per_word), groups), "int32")
        if group.ordered:
            whole = Axis("in", features=layer.in_features, elements=layer.in_features)  # which a rank cannot share
            found["weight_g_idx"] = Parameter((whole,), "int32")
        if group.static:
            found["input_scale"] = Parameter((1,), "float32")
        return found

    def format(self, layer: LinearLayer) -> WeightFormat:
        group = self._group(layer)
        assert group is not None
        codes = "float8_e4m3fn" if group.format == "float-quantized" else "int8" if group.bits == 8 else "uint4"
        size = group.block[1] if group.block else group.group_size
        return WeightFormat(codes, size, not group.symmetric, group.ordered, group.inputs, group.static)  # type: ignore[arg-type]

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        group = self._group(layer)
        assert group is not None
        found = {"scales": self._scales(group, layer, tensors["weight_scale"])}
        if group.format != PACKED:
            found["codes"] = tensors["weight"]
        else:
            for shape, part in zip(tensors["weight_shape"].tolist(), layer.parts, strict=True):
                if shape != [part.out_features, layer.in_features]:
                    raise CheckpointError(f"{part.name}: weight_shape is {shape}, not {[part.out_features, layer.in_features]}")
            codes = _unpack(tensors["weight_packed"], group.bits, 1)
            if group.ordered:
                found["order"] = self._order(group, layer, tensors["weight_g_idx"])
                codes = codes[:, found["order"]]
            found["codes"] = _codes(codes, group.bits)
            if not group.symmetric:
                zeros = _unpack(tensors["weight_zero_point"], group.bits, 0)
                found["zeros"] = zeros if group.bits == 4 else _codes(zeros, 8)
        if group.static:  # the parts have one input; where tools wrote several scales, the widest holds all
            found["input_scale"] = tensors["input_scale"].amax().reshape(1)
        return found

    def _scales(self, group: Group, layer: LinearLayer, scale: Tensor) -> Tensor:
        """f32[out, groups]"""
        if group.strategy == "tensor":  # [parts, 1]
            outs = torch.tensor([p.out_features for p in layer.parts], device=scale.device)
            return scale.repeat_interleave(outs, 0)
        if group.block:  # each part's blocks begin with the part
            size, rows, at = group.block[0], [], 0
            for part in layer.parts:
                count = -(-part.out_features // size)
                rows.append(scale[at : at + count].repeat_interleave(size, 0)[: part.out_features])
                at += count
            return torch.cat(rows)
        return scale

    def _order(self, group: Group, layer: LinearLayer, g_idx: Tensor) -> Tensor:
        """i64[in]: the inputs, group by group."""
        if (g_idx != g_idx[0]).any():
            names = ", ".join(part.name for part in layer.parts)
            raise CheckpointError(f"weight_g_idx of {names} differ: layers that are computed as one need one order of inputs")
        size = group.group_size or layer.in_features
        counts = torch.bincount(g_idx[0].clamp_min(0), minlength=layer.in_features // size)
        if (counts != size).any() or (g_idx < 0).any():
            raise CheckpointError(f"{layer.name}: weight_g_idx does not have {size} inputs in each of {len(counts)} groups")
        return g_idx[0].argsort(stable=True)

    def kv_scales(self, name: str) -> dict[str, Parameter] | None:
        if not self._kv:
            return None
        return {f"{name}.{which}_scale": Parameter((1,), "float32") for which in ("k", "v")}

    def _group(self, layer: LinearLayer) -> Group | None:
        found: Group | None = layer.alike(self._group_of, "config_groups and ignore of the checkpoint's quantization_config")
        return found

    def _group_of(self, name: str) -> Group | None:
        if any(_matches(pattern, name) for pattern in self._ignored):
            return None
        # A name or a pattern says more than "Linear", which means every linear layer.
        named = [group for targets, group in self._groups if any(_matches(t, name) for t in targets if t != "Linear")]
        return next(iter([*named, *(group for targets, group in self._groups if "Linear" in targets)]), None)


def _matches(pattern: str, name: str) -> bool:
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name


def _unpack(words: Tensor, bits: int, axis: int) -> Tensor:
    """i32 → u8, 32 / `bits` times as long along `axis`. The lowest bits come first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    moved = words.movedim(axis, -1)
    return (moved[..., None] >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(-2).movedim(-1, axis)


def _codes(codes: Tensor, bits: int) -> Tensor:
    """u8[out, in] in the canonical form."""
    if bits == 8:
        return (codes.to(torch.int16) - 128).to(torch.int8)
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, 0::2] | padded[:, 1::2] << 4
