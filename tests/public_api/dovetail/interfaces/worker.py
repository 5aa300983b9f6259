from __future__ import annotations
from collections.abc import Callable
from typing import Any, Protocol
from dovetail.types import KVGroup, StepPlan, StepResult
Progress = Callable[[str, int, int], None]
Handle = Any

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
