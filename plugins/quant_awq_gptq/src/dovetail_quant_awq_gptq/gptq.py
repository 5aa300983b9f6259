"""GPTQ (Frantar et al., arXiv 2210.17323), in the layout of AutoGPTQ and gptqmodel.

`qweight i32[in * bits / 32, out]` holds the inputs of a word, `qzeros i32[in / group, out * bits / 32]` the outputs,
`scales [in / group, out]`, `g_idx i32[in]` the group of each input; weight = (code - zero) * scale. Zero points of the first
version are stored minus one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.interfaces.matmul import Matmul, MatmulScheme, WeightFormat
from dovetail.interfaces.quantization import OUT, Axis, Declined, LinearLayer, Parameter
from dovetail_quant_awq_gptq.packing import canonical_codes, unpack


class Gptq(MatmulScheme):
    """Layers of a GPTQ checkpoint."""

    def __init__(self, matmul: Matmul, config: Mapping[str, Any]) -> None:
        super().__init__(matmul)
        self._bits: int = config.get("bits", 4)
        version = config.get("checkpoint_format", config.get("format", "gptq"))
        for name, given, known in (("bits", self._bits, (4, 8)), ("checkpoint_format", version, ("gptq", "gptq_v2"))):
            if given not in known:
                shown = " and ".join(map(repr, known))
                raise CheckpointError(f"quantization_config: GPTQ with {name} {given!r} is not supported; {shown} are")
        group = config.get("group_size", 128)
        self._group: int | None = None if group in (-1, None) else int(group)
        self._has_order: bool = config.get("desc_act", False)
        self._offset = 1 if version == "gptq" else 0
        self._lm_head: bool = config.get("lm_head", False)
        self._left_out = [re.compile(rule[2:]) for rule in config.get("dynamic") or () if rule.startswith("-:")]
        changed = [rule for rule in config.get("dynamic") or () if not rule.startswith("-:")]
        if changed:
            raise CheckpointError(f"quantization_config: GPTQ with other settings for some layers ({changed[0]}) is not supported")

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        if layer.alike(self._is_left_out, "the checkpoint's quantization_config"):
            return Declined("the checkpoint leaves it out")
        per_word, group = 32 // self._bits, self._group or layer.in_features
        odd = [part.name for part in layer.parts if part.out_features % per_word]
        if odd or layer.in_features % per_word:
            what = f"the outputs of {odd[0]}" if odd else "its inputs"
            raise CheckpointError(f"{layer.name} cannot be read as GPTQ: {what} are no multiple of {per_word}")
        if layer.in_features % group and self._has_order:
            raise CheckpointError(f"{layer.name} cannot be read as GPTQ: its inputs are not groups of {group}, in an order")
        groups = Axis("in", features=group)
        whole = Axis("in", features=layer.in_features, elements=layer.in_features)  # which a rank cannot share
        return {
            "qweight": Parameter((Axis("in", features=per_word), OUT), "int32"),
            "qzeros": Parameter((groups, Axis("out", features=per_word)), "int32"),
            "scales": Parameter((groups, OUT), "float32"),
            "g_idx": Parameter((whole if self._has_order else Axis("in"),), "int32"),
        }

    def format(self, layer: LinearLayer) -> WeightFormat:
        return WeightFormat("uint4" if self._bits == 4 else "int8", self._group, zeros=True, order=self._has_order)

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        codes = unpack(tensors["qweight"], self._bits, 0).T
        zeros = unpack(tensors["qzeros"], self._bits, 1).T.to(torch.int16) + self._offset
        found = {"scales": tensors["scales"].T, **canonical_codes(codes, zeros, self._bits)}
        if not self._has_order:
            return found
        order = self._order(layer, tensors["g_idx"])
        return found | {"order": order, **canonical_codes(codes[:, order], zeros, self._bits)}

    def _order(self, layer: LinearLayer, g_idx: Tensor) -> Tensor:
        """i64[in]: the inputs, group by group."""
        if (g_idx != g_idx[0]).any():
            names = ", ".join(part.name for part in layer.parts)
            raise CheckpointError(f"g_idx of {names} differ: layers that are computed as one need one order of their inputs")
        group = self._group or layer.in_features
        counts = torch.bincount(g_idx[0].clamp_min(0), minlength=layer.in_features // group)
        if (counts != group).any() or (g_idx < 0).any():
            raise CheckpointError(f"{layer.name}: g_idx does not have {group} inputs in each of {len(counts)} groups")
        return g_idx[0].argsort(stable=True)

    def _is_left_out(self, name: str) -> bool:
        return (name == "lm_head" and not self._lm_head) or any(rule.match(name) for rule in self._left_out)
