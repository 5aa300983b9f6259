from __future__ import annotations
from typing import Protocol
from dovetail.sequence import Sequence
from dovetail.types import BlockOp, EngineStats, KVGroup

class KVCacheManager(Protocol):
    groups: list[KVGroup]
    num_blocks: list[int]
    faults: list[tuple[int, Exception]]
    block_ops: list[BlockOp]

    def grow(self, seq_id: int, num_tokens: int) -> list[list[int]] | None:
        ...

    def share(self, source: int, target: int, num_tokens: int) -> int:
        ...

    def reuse(self, seq: Sequence, num_tokens: int, *, may_wait: bool=False) -> int | None:
        ...

    def num_cached(self, seq: Sequence, num_tokens: int) -> int:
        ...

    def reset_prefix_cache(self) -> None:
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

    def count(self, stats: EngineStats) -> None:
        ...

    @property
    def num_total(self) -> int:
        ...
CONTRACT = '0.2'
