"""The simplest prefix cache there is, for tests of the parts around it: whole beginnings as keys,
in order of their coming."""

from __future__ import annotations

from dovetail.interfaces.prefix_cache import NOT_HERE
from dovetail.sequence import Sequence

Key = tuple[str | None, str | None, tuple[int, ...]]


class DictionaryIndex:
    """A `PrefixCache`. Its memory grows with the square of the prompts' length."""

    def __init__(self, block_size: int, num_groups: int) -> None:
        self._block_size, self._num_groups = block_size, num_groups
        self.reset()

    def reset(self) -> None:
        self._places: dict[Key, list[int]] = {}
        """By key: the block in every KV group."""
        self._held: list[dict[int, Key]] = [{} for _ in range(self._num_groups)]
        """Per group: what each known block holds."""
        self._kept: list[dict[int, None]] = [{} for _ in range(self._num_groups)]
        """Per group: those that nobody uses, the first to go in front."""
        self._coming: dict[int, list[Key]] = {}
        """By running sequence: what it is about to compute."""

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
