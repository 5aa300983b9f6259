"""The options of the worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.plugin.provider import Options

Execution = Literal["auto", "plain", "compiled", "graphs"]
CaptureFailure = Literal["error", "plain"]
LinearKind = Literal["auto", "torch", "packed"]
LINEAR = (
    "linear layers that are not quantized. packed: C++ kernels (CPU). auto: packed where they can"
    " be had, unless execution is plain, which means torch throughout"
)
EXECUTION = (
    "how a model's forward pass runs. plain: torch, operation by operation. compiled: C++ kernels"
    " with packed weights, one call a step (CPU); for a model that runs through transformers,"
    " torch.compile, whose first start takes a minute or so and later ones use a cache. graphs:"
    " CUDA graphs for decode steps (GPU). auto: C++ kernels or CUDA graphs where they can be had,"
    " else plain"
)
CAPTURE_FAILURE = (
    "what to do where execution is graphs, also by auto, and a graph cannot be captured: error ends"
    " the start; plain runs without graphs, and says so"
)


class WorkerOptions(Options):
    execution: Execution = Field("auto", description=EXECUTION)
    on_capture_failure: CaptureFailure = Field("error", description=CAPTURE_FAILURE)
    linear: LinearKind = Field("auto", description=LINEAR)
    weights: Literal["checkpoint", "random"] = Field(
        "checkpoint",
        description=(
            "random: no file but config.json is read, and weights are made up, to measure a shape"
        ),
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        description=(
            "CPU threads of a step; default: torch's choice, within a container's CPU quota"
        ),
    )
