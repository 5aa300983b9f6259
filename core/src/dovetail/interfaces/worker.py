"""Define the worker, which does everything that touches the device. One object represents all ranks
of its parallel group.

Life cycle: `load`, `kv_groups`, `kv_memory`, `allocate`, `warm_up`, then `submit` / `sample` for
each step, and `close`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.weights import LayerWeights
from dovetail.types import KVGroup, StepPlan, StepResult

Progress = Callable[[str, int, int], None]
"""Callback for progress: (description of the work, units done, total units)."""

Handle = Any
"""A step in flight; opaque to the engine."""


@dataclass(frozen=True)
class WorkerCapabilities:
    """Capabilities of a worker beyond running steps, as data. A provider that declares none of
    these can do none of them."""

    shadow: bool = False
    """The worker runs the plan's shadow candidates beside the selected providers: it is a
    `ShadowingWorker`."""
    drafts: bool = False
    """The worker proposes draft tokens with the plan's draft model where a step plan contains
    `DRAFTED_BY_WORKER`."""
    host_tier: bool = False
    """The worker stores KV blocks in host memory and executes `block_ops` of kinds out and in: it
    is a `TieringWorker`."""
    describes_weights: bool = False
    """The worker reports how it will store the weights before reading any: it is a
    `DescribingWorker`."""


class Worker(Protocol):
    """Runs steps in the order in which they are submitted.

    Any method may raise. An exception in `submit` or `sample` fails the requests of that step;
    elsewhere it fails the engine. A worker that has lost its device raises `EngineDead` from any
    method, and a server then replaces the engine process.
    """

    def load(self, progress: Progress) -> None:
        """Read the weights. Raises `CheckpointError`, which names the file."""

    def kv_groups(self) -> list[KVGroup]:
        """Return the layers grouped by kind, with the size of a block in bytes."""

    def kv_memory(self) -> int:
        """Return the number of bytes that the KV cache may use on the device, after a profiling run
        if one is needed."""

    def allocate(self, num_blocks: list[int]) -> None:
        """Allocate the KV caches: `num_blocks` per group, the null block included."""

    def warm_up(self, progress: Progress) -> None:
        """Run everything that is slow the first time: kernel builds, graph captures."""

    def submit(self, plan: StepPlan) -> Handle:
        """Start a step. May return before it is done, and may be called while an earlier step runs.

        Rows of a plan that is not `masked` are sampled without waiting for `sample`, so that a
        later step can use their tokens as input.
        """

    def sample(self, handle: Handle, masks: dict[int, bytes] | None = None) -> StepResult:
        """Wait for the tokens of a step.

        `masks`, for `masked` plans, has bitmaps of the allowed tokens by seq_id, little-endian.
        """

    def close(self) -> None:
        """Release the device. Calling it again has no effect."""


class ShadowingWorker(Worker, Protocol):
    """A worker that declares `shadow`."""

    def shadow_report(self) -> ShadowReport | None:
        """Return the results of the candidates so far, or None if there is no shadow run. The
        object may change with every step."""


class DescribingWorker(Worker, Protocol):
    """A worker that declares `describes_weights`."""

    def weights(self) -> list[LayerWeights]:
        """Return the model's linear layers in order. May be called before or after `load`; reads
        tensor names but no weight.

        Raises `CheckpointError` or `ConfigError` if the checkpoint and the rules for its layers do
        not match.
        """


class TieringWorker(Worker, Protocol):
    """A worker that declares `host_tier`."""

    def allocate_host(self, num_blocks: list[int]) -> None:
        """Allocate the host tier: `num_blocks` per group, counted from 0. Called after `allocate`,
        if the engine config has a host tier. Raises `OutOfMemory`."""
