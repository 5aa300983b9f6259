from __future__ import annotations
from typing import Protocol
from dovetail.sequence import Sequence
from dovetail.types import KVGroup

class KVCacheManager(Protocol):
    groups: list[KVGroup]
    num_blocks: list[int]
    faults: list[tuple[int, Exception]]
    num_queried_tokens: int
    num_hit_tokens: int

    def grow(self, seq_id: int, num_tokens: int) -> list[list[int]] | None:
        ...

    def share(self, source: int, target: int, num_tokens: int) -> int:
        ...

    def reuse(self, seq: Sequence, num_tokens: int) -> int:
        ...

    def computed(self, seq: Sequence, num_tokens: int) -> None:
        ...

    def block_ids(self, seq_id: int) -> list[list[int]]:
        ...

    def trim(self, seq_id: int, num_computed_tokens: int) -> None:
        ...

    def free(self, seq_id: int) -> None:
        ...

    @property
    def num_used(self) -> int:
        ...

    @property
    def num_total(self) -> int:
        ...
