"""Index which block holds the KV of which tokens. The manager owns blocks and their reference
counts; this class only knows their contents and the order in which to evict unreferenced ones.

KV depends on all tokens before it, so the key of a block is everything up to its end, with adapter
and salt. Whole prefixes as keys need memory that grows with the square of their length; chained
hashes would not, but need a check for collisions.
"""

from __future__ import annotations

from dovetail.interfaces.prefix_cache import NOT_HERE
from dovetail.sequence import Sequence

Key = tuple[str | None, str | None, tuple[int, ...]]


class MyPluginIndex:
    """A `PrefixCache`; one object per engine."""

    def __init__(self, block_size: int, num_groups: int) -> None:
        self._block_size, self._num_groups = block_size, num_groups
        self.reset()

    def reset(self) -> None:
        self._block_ids: dict[Key, list[int]] = {}
        """Block ids in every KV group, or `NOT_HERE`, by key."""
        self._keys: list[dict[int, Key]] = [{} for _ in range(self._num_groups)]
        """Key of each cached block, per group."""
        self._evictable: list[dict[int, None]] = [{} for _ in range(self._num_groups)]
        """Cached unreferenced blocks per group, in order of their release."""
        self._expected: dict[Key, int] = {}
        """Sequence that is about to compute a block, by key."""

    def match(self, seq: Sequence, num_blocks: int) -> list[tuple[int, ...]]:
        found = []
        for i in range(num_blocks):
            known = self._block_ids.get(self._key(seq, i))
            if known is None:
                break
            found.append(tuple(known))
        return found

    def insert(self, seq: Sequence, first: int, block_ids: list[list[int]]) -> None:
        for i in range(len(block_ids[0])):
            key = self._key(seq, first + i)
            self._expected.pop(key, None)
            known = self._block_ids.get(key, [NOT_HERE] * self._num_groups)
            for group, blocks in enumerate(block_ids):
                if known[group] == NOT_HERE and blocks[i] != NOT_HERE:
                    known[group] = blocks[i]
                    self._keys[group][blocks[i]] = key
            if any(known):
                self._block_ids[key] = known

    def expect(self, seq: Sequence, first: int, end: int) -> None:
        for i in range(first, end):
            self._expected[self._key(seq, i)] = seq.seq_id

    def expected_from(self, seq: Sequence, block: int) -> int | None:
        return self._expected.get(self._key(seq, block))

    def claim(self, group: int, block_ids: list[int]) -> None:
        for block in block_ids:
            del self._evictable[group][block]

    def keep(self, group: int, block_id: int) -> bool:
        if block_id not in self._keys[group]:
            return False
        self._evictable[group][block_id] = None
        return True

    def evict(self, group: int, count: int) -> list[int]:
        blocks = list(self._evictable[group])[:count]
        for block in blocks:
            del self._evictable[group][block]
            key = self._keys[group].pop(block)
            known = self._block_ids[key]
            known[group] = NOT_HERE
            if not any(known):
                del self._block_ids[key]
        return blocks

    def forget(self, seq_id: int) -> None:
        self._expected = {key: i for key, i in self._expected.items() if i != seq_id}

    def _key(self, seq: Sequence, block: int) -> Key:
        end = (block + 1) * self._block_size
        return seq.request.adapter_id, seq.request.cache_salt, tuple(seq.tokens[:end])
