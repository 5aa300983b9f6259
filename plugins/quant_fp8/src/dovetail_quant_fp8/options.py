"""Define the options of FP8 quantization."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.plugin.provider import Options


class Fp8Options(Options):
    granularity: Literal["auto", "tensor", "channel", "block"] = Field(
        "auto",
        description=(
            "which weights share a scale: tensor: all of a layer, channel: those of an output,"
            " block: 128 × 128; auto: as in the checkpoint, or channel"
        ),
    )
    activations: Literal["auto", "static", "dynamic", "none"] = Field(
        "auto",
        description=(
            "how activations are rounded to FP8: static: by the checkpoint's scale, dynamic: by a"
            " scale per row, none: not at all; auto: as in the checkpoint, but none with block"
            " scales; for unquantized checkpoints dynamic, or none on a CPU"
        ),
    )
