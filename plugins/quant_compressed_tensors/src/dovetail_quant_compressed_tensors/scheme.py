"""Convert the tensors of each format to the canonical form.

| format | weight | scale |
|---|---|---|
| float-quantized | `weight f8_e4m3[out, in]` | `weight_scale [out, 1]`, `[1]`, `[out, in / group]` or by blocks |
| int-quantized | `weight i8[out, in]` | `weight_scale [out, 1]`, `[1]` or `[out, in / group]` |
| pack-quantized | `weight_packed i32[out, in * bits / 32]` | the same |

Packed codes are unsigned, with an offset of half their range, and the last word of a row may be
padded. `weight_shape i64[2]` is the unpadded shape. `weight_zero_point` has the scale's shape,
packed along the outputs (i8 and unpacked in int-quantized). `weight_g_idx i32[in]` exists if inputs
were reordered, and `input_scale [1]` if inputs are rounded with a static scale.
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
    """The scheme for the layers of a compressed-tensors checkpoint. `where` is the path of the
    config, for error messages."""

    def __init__(self, matmul: Matmul, config: Config, where: str) -> None:
        super().__init__(matmul)
        self._groups = Groups(where, config)
        self._kv: Mapping[str, Any] = config.get("kv_cache_scheme") or {}
        if self._kv and (
            self._kv.get("strategy", "tensor") != "tensor" or not self._kv.get("symmetric", True)
        ):
            what = "only one scale per tensor without zero points is supported"
            raise CheckpointError(
                f"{where}: quantization_config.kv_cache_scheme is {self._kv!r}; {what}"
            )
        # Scales that may be in the checkpoint without being needed: those of a KV cache that is not
        # quantized, and of inputs that are not rounded.
        self.unused = ("*.k_scale", "*.v_scale") if self._kv else ()
        if any(group.inputs is None for _, group in self._groups.all):
            self.unused += ("*.input_scale", "*.input_zero_point")

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        group = self._group_or_none(layer)
        if group is None:
            return Declined("not quantized in the checkpoint (ignore)")
        if group.ordered and layer.in_features % (group.group_size or layer.in_features):
            raise CheckpointError(
                f"{layer.name} cannot be read as {group.format}: with actorder, its"
                f" {layer.in_features} inputs must be a multiple of the group size"
                f" {group.group_size}"
            )
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
            # An axis that cannot be split between ranks.
            whole = Axis("in", features=layer.in_features, elements=layer.in_features)
            found["weight_g_idx"] = Parameter((whole,), "int32")
        if group.static:
            found["input_scale"] = Parameter((1,), "float32", scale="positive")
        return found

    def format(self, layer: LinearLayer) -> WeightFormat:
        group = self._group_for(layer)
        size = group.block[1] if group.block else group.group_size
        return WeightFormat(
            group.codes, size, not group.symmetric, group.ordered, group.inputs, group.static
        )

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        group = self._group_for(layer)
        found = {"scales": _scales(group, layer, tensors["weight_scale"])}
        if group.format == PACKED:
            found |= self._unpacked(group, layer, tensors)
        else:
            found["codes"] = tensors["weight"]
            if not group.symmetric:
                found["zeros"] = tensors["weight_zero_point"]
        if group.static:
            # The parts share one input. If there are several scales, the largest covers all ranges.
            found["input_scale"] = tensors["input_scale"].amax().reshape(1)
        return found

    def _unpacked(
        self, group: Group, layer: LinearLayer, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the codes, and the zero points and the order if there are any."""
        for shape, part in zip(tensors["weight_shape"].tolist(), layer.parts, strict=True):
            # A rank reads a shard, but the shape is that of the whole layer.
            if shape[0] % part.out_features or shape[1] % layer.in_features:
                raise CheckpointError(
                    f"{part.name}.weight_shape is {shape}, but the model's weight has shape"
                    f" {[part.out_features, layer.in_features]}: the checkpoint does not belong to"
                    " this model"
                )
        codes, found = unpack(tensors["weight_packed"], group.bits, 1)[:, : layer.in_features], {}
        if group.ordered:
            size = group.group_size or layer.in_features
            found["order"] = order_of_groups(layer, "weight_g_idx", tensors["weight_g_idx"], size)
            codes = codes[:, found["order"]]
        found["codes"] = canonical_codes(codes, group.bits)
        if not group.symmetric:
            # Words start anew with each part, and a part's last word may be padded.
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

    def _group_for(self, layer: LinearLayer) -> Group:
        group = self._group_or_none(layer)
        assert group is not None  # otherwise it was declined
        return group

    def _group_or_none(self, layer: LinearLayer) -> Group | None:
        found: Group | None = layer.alike(
            self._groups.of, "config_groups and ignore of the checkpoint's quantization_config"
        )
        return found


def _scales(group: Group, layer: LinearLayer, scale: Tensor) -> Tensor:
    """Return the scales as f32[out, groups]."""
    if group.strategy == "tensor":  # [parts, 1]
        outs = torch.tensor([p.out_features for p in layer.parts], device=scale.device)
        return scale.repeat_interleave(outs, 0)
    if group.block is None:
        return scale
    size = group.block[0]  # blocks start anew with each part
    return torch.cat(
        [piece.repeat_interleave(size, 0)[:outs] for piece, outs in _by_part(layer, scale, size)]
    )


def _by_part(layer: LinearLayer, tensor: Tensor, features: int) -> list[tuple[Tensor, int]]:
    """Split a tensor with one element per `features` outputs into the parts' elements. Returns
    them with each part's number of outputs."""
    pieces, start = [], 0
    for part in layer.parts:
        count = -(-part.out_features // features)
        pieces.append((tensor[start : start + count], part.out_features))
        start += count
    return pieces
