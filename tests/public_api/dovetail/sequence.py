from __future__ import annotations
from dataclasses import dataclass, field
from dovetail.types import FinishReason, Request, SequenceStart, StepPlan
NO_BLOCKS: list[list[int]] = []

@dataclass(eq=False, slots=True)
class Sequence:
    seq_id: int
    request: Request
    sample_index: int
    tokens: list[int]
    siblings: list[Sequence] = field(default_factory=list)
    num_prompt_tokens: int = field(init=False)
    max_len: int = field(init=False)
    end_ids: frozenset[int] = field(init=False)
    num_computed_tokens: int = 0
    num_slots: int = 0
    num_in_flight: int = 0
    steps_in_flight: int = 0
    draft_token_ids: list[int] = field(default_factory=list)
    num_prompt_counted: int = 0
    num_prompt_logprobs: int = 0
    on_worker: bool = False
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    added_at: float = 0.0
    started_at: float = 0.0

    @property
    def num_output_tokens(self) -> int:
        ...

    @property
    def num_tokens(self) -> int:
        ...

    @property
    def num_to_compute(self) -> int:
        ...

    def add_row(self, plan: StepPlan, count: int, added: list[list[int]], tables: list[list[int]]) -> None:
        ...

    def restart(self) -> None:
        ...

    def start(self, block_ids: list[list[int]]) -> SequenceStart:
        ...
