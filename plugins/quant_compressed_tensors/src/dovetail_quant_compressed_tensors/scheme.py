"""The tensors of each format, and what they are in the canonical form.

| format | weight | scale |
|---|---|---|
| float-quantized | `weight f8_e4m3[out, in]` | `weight_scale [out, 1]`, `[1]`, `[out, in / group]` or by blocks |
| int-quantized | `weight i8[out, in]` | `weight_scale [out, 1]`, `[1]` or `[out, in / group]` |
| pack-quantized | `weight_packed i32[out, in * bits / 32]` | the same |

Packed codes are unsigned, by half their range too large; the last word of a row may be filled up.
`weight_shape i64[2]` says what the words cannot, `weight_zero_point` has the scale's shape, packed
along the outputs (plain i8 in int-quantized), `weight_g_idx i32[in]` is there where inputs were put
in an order, `input_scale [1]` where inputs are rounded by a fixed one.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.interfaces.matmul import Matmul, MatmulScheme, WeightFormat
from dovetail.interfaces.packing import canonical_codes, canonical_zeros, order_of_groups, unpack
from dovetail.interfaces.quantization import IN, OUT, Axis, Declined, LinearLayer, Parameter
from dovetail_quant_compressed_tensors.groups import PACKED, Config, Group, Groups


class CompressedTensors(MatmulScheme):
    """Layers of a checkpoint, each as its group says. `where` is the file of the config, for
    errors."""

    def __init__(self, matmul: Matmul, config: Config, where: str) -> None:
        super().__init__(matmul)
        self._groups = Groups(where, config)
        self._kv: Mapping[str, Any] = config.get("kv_cache_scheme") or {}
        if self._kv and (
            self._kv.get("strategy", "tensor") != "tensor" or not self._kv.get("symmetric", True)
        ):
            what = "scales of keys and values are read by tensor, without zero points"
            raise CheckpointError(
                f"{where}: quantization_config.kv_cache_scheme is {self._kv!r}; {what}"
            )
        # Scales that are there and not needed: of a cache that is not rounded, and of inputs that
        # are taken as they are.
        self.unused = ("*.k_scale", "*.v_scale") if self._kv else ()
        if any(group.inputs is None for _, group in self._groups.all):
            self.unused += ("*.input_scale", "*.input_zero_point")

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        group = self._of(layer)
        if group is None:
            return Declined("the checkpoint leaves it out (ignore)")
        if group.ordered and layer.in_features % (group.group_size or layer.in_features):
            what = (
                f"its {layer.in_features} inputs are not whole groups of {group.group_size}, and in"
                " an order"
            )
            raise CheckpointError(f"{layer.name} cannot be read as {group.format}: {what}")
        found, per_word = {}, 32 // group.bits
        if group.format == PACKED:
            found["weight_packed"] = Parameter((OUT, Axis("in", features=per_word)), "int32")
            found["weight_shape"] = Parameter((2,), "int64")
        else:
            found["weight"] = Parameter((OUT, IN), group.codes)
        groups = 1 if group.group_size is None else Axis("in", features=group.group_size)
        scales: tuple[Axis | int, ...] = (1,) if group.strategy == "tensor" else (OUT, groups)
        if group.block:
            scales = (Axis("out", features=group.block[0]), Axis("in", features=group.block[1]))
        found["weight_scale"] = Parameter(scales, "float32", scale="not zero")
        if not group.symmetric:
            packed = Parameter((Axis("out", features=per_word), groups), "int32")
            found["weight_zero_point"] = (
                packed if group.format == PACKED else Parameter((OUT, groups), "int8")
            )
        if group.ordered:
            whole = Axis(
                "in", features=layer.in_features, elements=layer.in_features
            )  # which a rank cannot share
            found["weight_g_idx"] = Parameter((whole,), "int32")
        if group.static:
            found["input_scale"] = Parameter((1,), "float32", scale="positive")
        return found

    def format(self, layer: LinearLayer) -> WeightFormat:
        group = self._records(layer)
        size = group.block[1] if group.block else group.group_size
        return WeightFormat(
            group.codes, size, not group.symmetric, group.ordered, group.inputs, group.static
        )

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        group = self._records(layer)
        found = {"scales": _scales(group, layer, tensors["weight_scale"])}
        if group.format == PACKED:
            found |= self._unpacked(group, layer, tensors)
        else:
            found["codes"] = tensors["weight"]
            if not group.symmetric:
                found["zeros"] = tensors["weight_zero_point"]
        if (
            group.static
        ):  # the parts have one input; where tools wrote several scales, the widest holds all
            found["input_scale"] = tensors["input_scale"].amax().reshape(1)
        return found

    def _unpacked(
        self, group: Group, layer: LinearLayer, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """codes, and zeros and order if there are any."""
        for shape, part in zip(tensors["weight_shape"].tolist(), layer.parts, strict=True):
            if (
                shape[0] % part.out_features or shape[1] % layer.in_features
            ):  # of a rank's share, it is the whole layer's
                raise CheckpointError(
                    f"{part.name}.weight_shape is {shape}, and the model has"
                    f" {[part.out_features, layer.in_features]} there: the checkpoint is not of"
                    " this model's sizes"
                )
        codes, found = unpack(tensors["weight_packed"], group.bits, 1)[:, : layer.in_features], {}
        if group.ordered:
            size = group.group_size or layer.in_features
            found["order"] = order_of_groups(layer, "weight_g_idx", tensors["weight_g_idx"], size)
            codes = codes[:, found["order"]]
        found["codes"] = canonical_codes(codes, group.bits)
        if not group.symmetric:
            # Each part's words begin with the part, and its last may be filled up.
            pieces = _by_part(layer, tensors["weight_zero_point"], 32 // group.bits)
            zeros = torch.cat([unpack(piece, group.bits, 0)[:outs] for piece, outs in pieces])
            found["zeros"] = canonical_zeros(zeros, group.bits)
        return found

    def kv_scales(self, name: str) -> dict[str, Parameter] | None:
        if not self._kv or self._kv.get("dynamic", False):
            return None
        return {
            f"{name}.{which}_scale": Parameter((1,), "float32", scale="positive")
            for which in ("k", "v")
        }

    def _records(self, layer: LinearLayer) -> Group:
        group = self._of(layer)
        assert group is not None  # or it was declined
        return group

    def _of(self, layer: LinearLayer) -> Group | None:
        found: Group | None = layer.alike(
            self._groups.of, "config_groups and ignore of the checkpoint's quantization_config"
        )
        return found


def _scales(group: Group, layer: LinearLayer, scale: Tensor) -> Tensor:
    """f32[out, groups]"""
    if group.strategy == "tensor":  # [parts, 1]
        outs = torch.tensor([p.out_features for p in layer.parts], device=scale.device)
        return scale.repeat_interleave(outs, 0)
    if group.block is None:
        return scale
    size = group.block[0]  # each part's blocks begin with the part
    return torch.cat(
        [piece.repeat_interleave(size, 0)[:outs] for piece, outs in _by_part(layer, scale, size)]
    )


def _by_part(layer: LinearLayer, tensor: Tensor, features: int) -> list[tuple[Tensor, int]]:
    """A tensor with an element for `features` outputs → each part's elements, and its outputs."""
    pieces, start = [], 0
    for part in layer.parts:
        count = -(-part.out_features // features)
        pieces.append((tensor[start : start + count], part.out_features))
        start += count
    return pieces
