from __future__ import annotations
import hashlib
import math
import os
import random
import time
from dataclasses import dataclass, field
from typing import Any
from dovetail.errors import StepFailed
from dovetail.interfaces.clock import Clock, SystemClock
from dovetail.interfaces.worker import Progress
from dovetail.types import DRAFTED_BY_WORKER, KVGroup, SequenceStart, StepPlan, StepResult, TokenLogprobs
POISON = -1

@dataclass
class Faults:
    raise_at: int | None = None
    exit_at: int | None = None
    hang_at: int | None = None
    step_seconds: float = 0.0
    load_seconds: float = 0.0

class SimulatedWorker:

    def __init__(self, groups: list[KVGroup], vocab_size: int=64, memory: int=1 << 30, faults: Faults | None=None, clock: Clock | None=None) -> None:
        ...

    def load(self, progress: Progress) -> None:
        ...

    def kv_groups(self) -> list[KVGroup]:
        ...

    def kv_memory(self) -> int:
        ...

    def allocate(self, num_blocks: list[int]) -> None:
        ...

    def allocate_host(self, num_blocks: list[int]) -> None:
        ...

    def warm_up(self, progress: Progress) -> None:
        ...

    def submit(self, plan: StepPlan) -> StepResult:
        ...

    def sample(self, handle: Any, masks: dict[int, bytes] | None=None) -> StepResult:
        ...

    def close(self) -> None:
        ...
