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
            "MiB of device memory for partial results; default: what steps of max_num_seqs rows"
            " need"
        ),
    )
    backend: Literal["auto", "fa2", "fa3"] = Field(
        "fa2",
        description=(
            "kernels for steps with prefill: fa3 is for Hopper alone; auto takes it there where it"
            " can. FlashInfer compiles what it has no binary of when it is first needed: fa2 for"
            " minutes, fa3 for up to an hour"
        ),
    )
