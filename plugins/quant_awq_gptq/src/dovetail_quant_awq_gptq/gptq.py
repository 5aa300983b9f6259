"""GPTQ (Frantar et al., arXiv 2210.17323), in the layout of AutoGPTQ and gptqmodel.

`qweight i32[in * bits / 32, out]` holds the inputs of a word, `qzeros i32[in / group, out * bits /
32]` the outputs, `scales [in / group, out]`, `g_idx i32[in]` the group of each input; weight =
(code - zero) * scale.

The first version of the format stores one less than each zero point. Tools subtract from whole
words, so that a zero point of 0 borrows from the next one: whole words are what one is added to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.interfaces.matmul import Matmul, MatmulScheme, WeightFormat
from dovetail.interfaces.packing import (
    canonical_codes,
    canonical_zeros,
    order_of_groups,
    plain_groups,
    unpack,
)
from dovetail.interfaces.quantization import OUT, Axis, Declined, LinearLayer, Parameter
from dovetail_quant_awq_gptq.settings import Config, group_size, one_of

ONES = {4: 0x11111111, 8: 0x01010101}
"""A word of ones, by bits."""


@dataclass(frozen=True)
class Settings:
    """How some layers are stored."""

    bits: int
    group: int | None
    """Inputs that share a scale; None: all."""
    ordered: bool
    """Groups are of inputs that lie apart (`desc_act`)."""

    @classmethod
    def of(cls, where: str, config: Config) -> Settings:
        bits = one_of(where, config, ("bits",), (4, 8), 4)
        return cls(
            bits, group_size(where, config, ("group_size",)), bool(config.get("desc_act", False))
        )


class Gptq(MatmulScheme):
    """Layers of a GPTQ checkpoint. `where` is the file of the config, for errors."""

    unused = ("*.bias",)  # AutoGPTQ wrote zeros for layers that have none

    def __init__(self, matmul: Matmul, config: Config, where: str) -> None:
        super().__init__(matmul)
        self._settings = Settings.of(where, config)
        version = one_of(where, config, ("checkpoint_format",), ("gptq", "gptq_v2"), "gptq")
        one_of(where, config, ("pack_dtype",), ("int32",), "int32")
        self._is_first_version = version == "gptq"
        self._lm_head: bool = config.get("lm_head", False)
        self._inside = [
            name for names in config.get("modules_in_block_to_quantize") or () for name in names
        ]
        self._rules: list[tuple[re.Pattern[str], Settings | None]] = []
        for rule, changes in (config.get("dynamic") or {}).items():
            settings = (
                None if rule.startswith("-:") else Settings.of(where, {**config, **(changes or {})})
            )
            self._rules.append((re.compile(rule.removeprefix("-:").removeprefix("+:")), settings))

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        settings = self._of(layer)
        if settings is None:
            return Declined("the checkpoint leaves it out (quantization_config)")
        per_word, group = 32 // settings.bits, settings.group or layer.in_features
        odd = [part.name for part in layer.parts if part.out_features % per_word]
        if odd or layer.in_features % per_word:
            what = f"the outputs of {odd[0]}" if odd else f"its {layer.in_features} inputs"
            raise CheckpointError(
                f"{layer.name} cannot be read as GPTQ: {what} are no multiple of {per_word}"
            )
        if layer.in_features % group and settings.ordered:
            what = (
                f"its {layer.in_features} inputs are not whole groups of {group}, and in an order"
            )
            raise CheckpointError(f"{layer.name} cannot be read as GPTQ: {what}")
        groups = Axis("in", features=group)
        whole = Axis(
            "in", features=layer.in_features, elements=layer.in_features
        )  # which a rank cannot share
        return {
            "qweight": Parameter((Axis("in", features=per_word), OUT), "int32"),
            "qzeros": Parameter((groups, Axis("out", features=per_word)), "int32"),
            "scales": Parameter((groups, OUT), "float32", scale="not zero"),
            "g_idx": Parameter((whole if settings.ordered else Axis("in"),), "int32"),
        }

    def format(self, layer: LinearLayer) -> WeightFormat:
        settings = self._records(layer)
        codes: Any = "uint4" if settings.bits == 4 else "int8"
        return WeightFormat(codes, settings.group, zeros=True, order=settings.ordered)

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        settings = self._records(layer)
        codes = unpack(tensors["qweight"], settings.bits, 0).T
        words = (
            tensors["qzeros"] + ONES[settings.bits] if self._is_first_version else tensors["qzeros"]
        )
        found = {"scales": tensors["scales"].T}
        if settings.ordered:
            found["order"] = order_of_groups(
                layer, "g_idx", tensors["g_idx"], settings.group or layer.in_features
            )
            codes = codes[:, found["order"]]
        else:
            self._check_plain(settings, layer, tensors["g_idx"])
        zeros = canonical_zeros(unpack(words, settings.bits, 1).T, settings.bits)
        return {**found, "codes": canonical_codes(codes, settings.bits), "zeros": zeros}

    def _check_plain(self, settings: Settings, layer: LinearLayer, g_idx: Tensor) -> None:
        """Of a rank's share too, which begins with some group."""
        group = settings.group or layer.in_features
        if (g_idx - g_idx[:, :1] != plain_groups(layer, g_idx, group)).any():
            raise CheckpointError(
                f"{layer.name}.g_idx is not one group of {group} inputs after the other, as "
                "quantization_config says: is its group_size wrong, or desc_act, which is false?"
            )

    def _records(self, layer: LinearLayer) -> Settings:
        settings = self._of(layer)
        assert settings is not None  # or it was declined
        return settings

    def _of(self, layer: LinearLayer) -> Settings | None:
        found: Settings | None = layer.alike(
            self._settings_of, "the checkpoint's quantization_config"
        )
        return found

    def _settings_of(self, name: str) -> Settings | None:
        for pattern, settings in self._rules:
            if pattern.match(name):
                return settings
        if name == "lm_head":
            return self._settings if self._lm_head else None
        is_inside = not self._inside or any(name.endswith(f".{inner}") for inner in self._inside)
        return self._settings if is_inside else None
