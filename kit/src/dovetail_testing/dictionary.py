"""Provide the simplest possible prefix cache, for tests of other components: whole prefixes as
keys, evicted in order of insertion."""

from __future__ import annotations

from dovetail.interfaces.prefix_cache import NOT_HERE
from dovetail.sequence import Sequence

Key = tuple[str | None, str | None, tuple[int, ...]]


class DictionaryIndex:
    """A `PrefixCache` whose memory grows with the square of the prompt length."""

    def __init__(self, block_size: int, num_groups: int) -> None:
        self._block_size, self._num_groups = block_size, num_groups
        self.reset()

    def reset(self) -> None:
        self._places: dict[Key, list[int]] = {}
        """Block id in every KV group, by key."""
        self._held: list[dict[int, Key]] = [{} for _ in range(self._num_groups)]
        """Key of each cached block, per group."""
        self._kept: list[dict[int, None]] = [{} for _ in range(self._num_groups)]
        """Evictable blocks per group, the first to evict in front."""
        self._coming: dict[int, list[Key]] = {}
        """Keys that a running sequence is about to compute, by sequence."""

    def match(self, seq: Sequence, num_blocks: int) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        while len(found) < num_blocks and (places := self._places.get(self._key(seq, len(found)))):
            found.append(tuple(places))
        return found

    def insert(self, seq: Sequence, first: int, block_ids: list[list[int]]) -> None:
        for i, blocks in enumerate(zip(*block_ids, strict=True), first):
            key = self._key(seq, i)
            if key in (coming := self._coming.get(seq.seq_id, [])):
                coming.remove(key)
            places = self._places.setdefault(key, [NOT_HERE] * self._num_groups)
            for group, block in enumerate(blocks):
                if block != NOT_HERE and places[group] == NOT_HERE:
                    places[group] = block
                    self._held[group][block] = key
            if not any(places):
                del self._places[key]

    def expect(self, seq: Sequence, first: int, end: int) -> None:
        self._coming[seq.seq_id] = [self._key(seq, i) for i in range(first, end)]

    def expected_from(self, seq: Sequence, block: int) -> int | None:
        key = self._key(seq, block)
        return next((of for of, keys in self._coming.items() if key in keys), None)

    def claim(self, group: int, block_ids: list[int]) -> None:
        for block in block_ids:
            del self._kept[group][block]

    def keep(self, group: int, block_id: int) -> bool:
        if block_id not in self._held[group]:
            return False
        self._kept[group][block_id] = None
        return True

    def evict(self, group: int, count: int) -> list[int]:
        blocks = list(self._kept[group])[:count]
        for block in blocks:
            del self._kept[group][block]
            key = self._held[group].pop(block)
            self._places[key][group] = NOT_HERE
            if not any(self._places[key]):
                del self._places[key]
        return blocks

    def forget(self, seq_id: int) -> None:
        self._coming.pop(seq_id, None)

    def _key(self, seq: Sequence, block: int) -> Key:
        end = (block + 1) * self._block_size
        return seq.request.adapter_id, seq.request.cache_salt, tuple(seq.tokens[:end])
