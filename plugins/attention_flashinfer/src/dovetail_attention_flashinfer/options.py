"""The options of the backend."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.plugin.provider import Options


class FlashInferOptions(Options):
    workspace_mb: int | None = Field(
        None,
        ge=16,
        description=(
            "MiB of device memory for partial results; default: enough for steps of max_num_seqs"
            " rows"
        ),
    )
    backend: Literal["auto", "fa2", "fa3"] = Field(
        "fa2",
        description=(
            "kernels for steps with prefill: fa3 requires Hopper; auto uses it there if possible."
            " FlashInfer compiles kernels without a binary on first use: minutes for fa2, up to an"
            " hour for fa3"
        ),
    )
