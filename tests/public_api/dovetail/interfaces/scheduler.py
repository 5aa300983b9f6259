from __future__ import annotations
from dataclasses import dataclass
from typing import Literal, Protocol
from dovetail.sequence import Sequence
from dovetail.types import StepPlan

@dataclass(frozen=True)
class SchedulerCapabilities:
    order: Literal['arrival', 'priority'] | None = None

class Scheduler(Protocol):
    waiting: list[Sequence]
    running: list[Sequence]
    num_preemptions: int

    def add(self, seq: Sequence) -> None:
        ...

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        ...

    def remove(self, seq: Sequence) -> None:
        ...
