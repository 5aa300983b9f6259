"""The options of the scheme."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.plugin.provider import Options


class Fp8Options(Options):
    granularity: Literal["auto", "tensor", "channel", "block"] = Field(
        "auto",
        description=(
            "which weights share a scale: a whole layer's, an output's, or 128 × 128 of them; auto:"
            " as the checkpoint has it, or channel"
        ),
    )
    activations: Literal["auto", "static", "dynamic", "none"] = Field(
        "auto",
        description=(
            "how a layer's inputs are rounded to FP8: by the checkpoint's scale, each row by its"
            " own, or not; auto: as the checkpoint says; of plain weights dynamic, but none on a"
            " CPU; and with a scale for each block: none"
        ),
    )
