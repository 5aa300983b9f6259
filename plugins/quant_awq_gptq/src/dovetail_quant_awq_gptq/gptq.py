"""Read GPTQ checkpoints (Frantar et al., arXiv 2210.17323) in the layout of AutoGPTQ and gptqmodel.

`qweight i32[in * bits / 32, out]` packs inputs into words, `qzeros i32[in / group, out * bits /
32]` packs outputs; `scales [in / group, out]`; `g_idx i32[in]` is the group of each input. weight =
(code - zero) * scale.

Version 1 of the format stores zero points minus one. Tools subtract from whole words, so that a
zero point of 0 borrows from the next one; therefore one is added back to whole words.
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
"""The word whose codes are all 1, by number of bits."""


@dataclass(frozen=True)
class Settings:
    """Quantization settings of some layers."""

    bits: int
    group: int | None
    """Number of inputs that share a scale; None means all."""
    ordered: bool
    """True if the inputs of a group are not contiguous (`desc_act`)."""

    @classmethod
    def of(cls, where: str, config: Config) -> Settings:
        bits = one_of(where, config, ("bits",), (4, 8), 4)
        return cls(
            bits, group_size(where, config, ("group_size",)), bool(config.get("desc_act", False))
        )


class Gptq(MatmulScheme):
    """The scheme for the layers of a GPTQ checkpoint. `where` is the path of the config, for error
    messages."""

    unused = ("*.bias",)  # AutoGPTQ wrote zero biases for layers without a bias

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
        settings = self._settings_or_none(layer)
        if settings is None:
            return Declined("not quantized in the checkpoint (quantization_config)")
        per_word, group = 32 // settings.bits, settings.group or layer.in_features
        odd = [part.name for part in layer.parts if part.out_features % per_word]
        if odd or layer.in_features % per_word:
            features = f"the outputs of {odd[0]}" if odd else f"its {layer.in_features} inputs"
            raise CheckpointError(
                f"{layer.name} cannot be read as GPTQ: {features} are not a multiple of {per_word}"
            )
        if layer.in_features % group and settings.ordered:
            raise CheckpointError(
                f"{layer.name} cannot be read as GPTQ: with desc_act, its {layer.in_features}"
                f" inputs must be a multiple of the group size {group}"
            )
        groups = Axis("in", features=group)
        # An axis that cannot be split between ranks.
        whole = Axis("in", features=layer.in_features, elements=layer.in_features)
        return {
            "qweight": Parameter((Axis("in", features=per_word), OUT), "int32"),
            "qzeros": Parameter((groups, Axis("out", features=per_word)), "int32"),
            "scales": Parameter((groups, OUT), "float32", scale="not zero"),
            "g_idx": Parameter((whole if settings.ordered else Axis("in"),), "int32"),
        }

    def format(self, layer: LinearLayer) -> WeightFormat:
        settings = self._settings_for(layer)
        codes: Any = "uint4" if settings.bits == 4 else "int8"
        return WeightFormat(codes, settings.group, zeros=True, order=settings.ordered)

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        settings = self._settings_for(layer)
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
            self._check_contiguous(settings, layer, tensors["g_idx"])
        zeros = canonical_zeros(unpack(words, settings.bits, 1).T, settings.bits)
        return {**found, "codes": canonical_codes(codes, settings.bits), "zeros": zeros}

    def _check_contiguous(self, settings: Settings, layer: LinearLayer, g_idx: Tensor) -> None:
        """Check that groups of inputs are contiguous. A rank's shard may begin with any group."""
        group = settings.group or layer.in_features
        if (g_idx - g_idx[:, :1] != plain_groups(layer, g_idx, group)).any():
            raise CheckpointError(
                f"{layer.name}.g_idx does not have contiguous groups of {group} inputs, as"
                " quantization_config says: is group_size wrong, or should desc_act be true?"
            )

    def _settings_for(self, layer: LinearLayer) -> Settings:
        settings = self._settings_or_none(layer)
        assert settings is not None  # otherwise it was declined
        return settings

    def _settings_or_none(self, layer: LinearLayer) -> Settings | None:
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
