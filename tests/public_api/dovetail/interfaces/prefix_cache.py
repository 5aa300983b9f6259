from __future__ import annotations
from typing import Protocol
from dovetail.sequence import Sequence
NOT_HERE = 0

class PrefixCache(Protocol):

    def match(self, seq: Sequence, num_blocks: int) -> list[tuple[int, ...]]:
        ...

    def insert(self, seq: Sequence, first: int, block_ids: list[list[int]]) -> None:
        ...

    def expect(self, seq: Sequence, first: int, end: int) -> None:
        ...

    def expected_from(self, seq: Sequence, block: int) -> int | None:
        ...

    def claim(self, group: int, block_ids: list[int]) -> None:
        ...

    def keep(self, group: int, block_id: int) -> bool:
        ...

    def evict(self, group: int, count: int) -> list[int]:
        ...

    def forget(self, seq_id: int) -> None:
        ...

    def reset(self) -> None:
        ...

class TieredPrefixCache(PrefixCache, Protocol):

    def demote(self, group: int, host_blocks: list[int]) -> list[int]:
        ...

    def promote(self, group: int, host_blocks: list[int], block_ids: list[int]) -> None:
        ...

    def evict_host(self, group: int, count: int) -> list[int]:
        ...
CONTRACT = '0.2'
