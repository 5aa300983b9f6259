from __future__ import annotations
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.weights import LayerWeights
from dovetail.types import KVGroup, StepPlan, StepResult
Progress = Callable[[str, int, int], None]
Handle = Any

@dataclass(frozen=True)
class WorkerCapabilities:
    shadow: bool = False
    drafts: bool = False
    host_tier: bool = False
    describes_weights: bool = False

class Worker(Protocol):

    def load(self, progress: Progress) -> None:
        ...

    def kv_groups(self) -> list[KVGroup]:
        ...

    def kv_memory(self) -> int:
        ...

    def allocate(self, num_blocks: list[int]) -> None:
        ...

    def warm_up(self, progress: Progress) -> None:
        ...

    def submit(self, plan: StepPlan) -> Handle:
        ...

    def sample(self, handle: Handle, masks: dict[int, bytes] | None=None) -> StepResult:
        ...

    def close(self) -> None:
        ...

class ShadowingWorker(Worker, Protocol):

    def shadow_report(self) -> ShadowReport | None:
        ...

class DescribingWorker(Worker, Protocol):

    def weights(self) -> list[LayerWeights]:
        ...

class TieringWorker(Worker, Protocol):

    def allocate_host(self, num_blocks: list[int]) -> None:
        ...
