"""The worker: everything that touches the device. One object stands for all ranks of its parallel
group.

Life: `load`, `kv_groups`, `kv_memory`, `allocate`, `warm_up`, then `submit` / `sample` for every
step, and `close`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.weights import LayerWeights
from dovetail.types import KVGroup, StepPlan, StepResult

Progress = Callable[[str, int, int], None]
"""(what is being done, done so far, of how many)"""

Handle = Any
"""A step in flight, opaque to the engine."""


@dataclass(frozen=True)
class WorkerCapabilities:
    """What a worker can do beyond running steps, as data. A provider that declares none can do none
    of it."""

    shadow: bool = False
    """It runs the plan's candidates beside what answers: it is a `ShadowingWorker`."""
    drafts: bool = False
    """It drafts with the plan's draft model where a plan asks for that (`DRAFTED_BY_WORKER`)."""
    host_tier: bool = False
    """It keeps KV blocks in host memory and does a plan's `block_ops` of kinds out and in: it is a
    `TieringWorker`."""
    describes_weights: bool = False
    """It says how it keeps the weights before it reads any: it is a `DescribingWorker`."""


class Worker(Protocol):
    """Steps run in the order they are submitted. Any method may raise; in `submit` and `sample`
    only that step's requests fail, elsewhere the engine does. A worker whose device is lost raises
    `EngineDead` anywhere: a server then replaces the engine's process."""

    def load(self, progress: Progress) -> None:
        """Read the weights. Raises `CheckpointError` that names the file."""

    def kv_groups(self) -> list[KVGroup]:
        """Layers by kind, with the bytes of a block."""

    def kv_memory(self) -> int:
        """Bytes that the KV cache may take on the device, after a profiling run where one is
        needed."""

    def allocate(self, num_blocks: list[int]) -> None:
        """Make the caches, `num_blocks` per group, the null block included."""

    def warm_up(self, progress: Progress) -> None:
        """Run once whatever is slow the first time: kernel builds, graph captures."""

    def submit(self, plan: StepPlan) -> Handle:
        """Start a step; may return before it is done, and while an earlier one still runs.

        Rows of a plan that is not `masked` are sampled without waiting for `sample`, so that a
        later step can take their tokens as input.
        """

    def sample(self, handle: Handle, masks: dict[int, bytes] | None = None) -> StepResult:
        """Wait for a step's tokens.

        `masks`, for `masked` plans, are bitmaps of the tokens allowed, little-endian, by seq_id.
        """

    def close(self) -> None:
        """Release the device. Idempotent."""


class ShadowingWorker(Worker, Protocol):
    """A worker that declares `shadow`."""

    def shadow_report(self) -> ShadowReport | None:
        """What the candidates have shown so far; None without a shadow run. The object may change
        with every step."""


class DescribingWorker(Worker, Protocol):
    """A worker that declares `describes_weights`."""

    def weights(self) -> list[LayerWeights]:
        """The model's linear layers, in their order, before or after `load`. Reads names and no
        weight.

        Raises `CheckpointError` or `ConfigError` where the checkpoint and the rules for its layers
        do not fit."""


class TieringWorker(Worker, Protocol):
    """A worker that declares `host_tier`."""

    def allocate_host(self, num_blocks: list[int]) -> None:
        """Make the host tier, `num_blocks` per group, counted from 0. Called after `allocate`, if
        the composition has one.

        Raises `OutOfMemory`."""
