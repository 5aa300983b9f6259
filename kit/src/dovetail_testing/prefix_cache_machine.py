"""Provide the state machine of the prefix-cache contract. It acts as the KV-cache manager, and
knows the content of every block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from dovetail.interfaces.prefix_cache import NOT_HERE, PrefixCache
from dovetail.sequence import Sequence
from dovetail.types import KVGroup, Request, SamplingParams
from dovetail_testing.machines import Machine, beginning, operation

Content = tuple[Any, ...]
"""Adapter, salt, and all tokens up to the end of a block."""

TEXTS = (
    [0] * 10,
    [0, 1] * 5,
    [0, 0, 0, 1, 0, 1, 0, 0, 0, 1],
    [1, 1] + [0] * 8,
    [256, 0] * 5,
    [65_536, 0] * 5,
    [9, 8, 7, 6, 5],
)
"""Texts with common prefixes, with common parts after different prefixes, and with tokens that are
equal in their last one or two bytes."""
texts = st.builds(lambda text, length: text[:length], st.sampled_from(TEXTS), st.integers(2, 10))


@dataclass
class Blocks:
    """The blocks of one KV group except the null block. Each is free, evictable, or in the table of
    a sequence."""

    free: set[int]
    evictable: set[int] = field(default_factory=set)
    holds: dict[int, Content] = field(default_factory=dict)
    """Content of a block since it was inserted, until it is removed."""
    ambiguous: set[Content] = field(default_factory=set)
    """Contents that two blocks had at the same time: the cache may know either block."""


class IndexMachine(Machine):
    """A machine with one KV group, or with two of which the second has a window that covers only
    the last block of a sequence."""

    size = 2
    cache: PrefixCache

    def __init__(self, new: Callable[[list[KVGroup], list[int]], PrefixCache]) -> None:
        super().__init__()
        self.new = new
        self.sequences: dict[int, Sequence] = {}
        self.tables: dict[int, list[list[int]]] = {}
        """Block tables by sequence and group."""
        self.coming: dict[int, tuple[int, int]] = {}
        """By sequence: the next block that it is expected to compute, and the end of the expected
        blocks."""
        self.unsure: set[Content] = set()
        """Contents that two sequences were expected to compute: once one of them has computed it,
        or has gone, the cache may forget the other."""
        self.next_id = 0

    @beginning(num_blocks=st.integers(2, 14), windows=st.sampled_from([[None], [None, 2]]))
    def build(self, num_blocks: int, windows: list[int | None]) -> None:
        kinds = ["full" if w is None else "sliding" for w in windows]
        groups = [KVGroup([i], kinds[i], self.size, 1, w) for i, w in enumerate(windows)]
        counts = [num_blocks + 2 * i for i, _ in enumerate(groups)]
        self.groups = [Blocks(set(range(1, n))) for n in counts]
        self.cache = self.new(groups, counts)

    @operation(
        tokens=texts,
        salt=st.sampled_from([None, None, None, "s"]),
        adapter=st.sampled_from([None, None, None, "a"]),
        gaps=st.sets(st.integers(0, 4)),
        asks_for_all=st.booleans(),
        stays=st.booleans(),
        takes_time=st.booleans(),
    )
    def start(
        self,
        tokens: list[int],
        salt: str | None,
        adapter: str | None,
        gaps: set[int],
        asks_for_all: bool,
        stays: bool,
        takes_time: bool,
    ) -> None:
        seq = self._new_sequence(tokens, salt, adapter)
        limit = len(tokens) // self.size - (not asks_for_all)
        found = [tuple(ids) for ids in self.cache.match(seq, limit)]
        assert len(found) <= limit, (
            f"{len(found)} blocks were found, but at most {limit} were requested"
        )
        self._compare(seq, found, limit)
        tables = self._heads(found)
        for i, (blocks, table) in enumerate(zip(self.groups, tables, strict=True)):
            claimed = [b for b in table if b in blocks.evictable]
            self.cache.claim(i, claimed)
            blocks.evictable -= set(claimed)
        self.sequences[seq.seq_id], self.tables[seq.seq_id] = seq, tables
        self._expect(seq, len(tables[0]))
        if takes_time:
            return  # `grow` computes its blocks
        if not self._fill(seq, gaps) or not stays:
            self._end(seq.seq_id)

    def _expect(self, seq: Sequence, first: int) -> None:
        end = len(seq.tokens) // self.size
        if first < end:
            self.unsure |= {self._content(seq, i) for i in range(first, end)} & self._all_coming()
            self.cache.expect(seq, first, end)
            self.coming[seq.seq_id] = first, end

    def _all_coming(self) -> set[Content]:
        return {
            self._content(self.sequences[of], i)
            for of, (first, end) in self.coming.items()
            for i in range(first, end)
        }

    def _has_come(self, seq: Sequence, first: int, count: int) -> None:
        end = self.coming.pop(seq.seq_id, (0, 0))[1]
        self.unsure |= {
            self._content(seq, i) for i in range(first, first + count)
        } & self._all_coming()
        if first + count < end:
            self.coming[seq.seq_id] = first + count, end

    @operation(
        tokens=texts,
        salt=st.sampled_from([None, None, None, "s"]),
        adapter=st.sampled_from([None, None, None, "a"]),
    )
    def ask_what_comes(self, tokens: list[int], salt: str | None, adapter: str | None) -> None:
        """Ask for each block of a waiting sequence which sequence computes it; then remove it."""
        seq = self._new_sequence(tokens, salt, adapter)
        for i in range(len(tokens) // self.size):
            content = self._content(seq, i)
            possible = {
                owner
                for owner, (first, end) in self.coming.items()
                if any(
                    self._content(self.sequences[owner], j) == content for j in range(first, end)
                )
            }
            owner = self.cache.expected_from(seq, i)
            if owner is None:
                assert not possible or content in self.unsure, (
                    f"sequences {possible} compute {content}, but none is expected to"
                )
            else:
                assert owner in possible, (
                    f"sequence {owner} is expected to compute {content}, but the running sequences"
                    f" that do are {possible}"
                )
        self.cache.forget(seq.seq_id)

    def _new_sequence(self, tokens: list[int], salt: str | None, adapter: str | None) -> Sequence:
        r = Request(
            f"r{self.next_id}",
            tokens,
            SamplingParams(),
            20,
            0,
            [],
            adapter_id=adapter,
            cache_salt=salt,
        )
        self.next_id += 1
        return Sequence(self.next_id - 1, r, 0, list(tokens))

    def _compare(self, seq: Sequence, found: list[tuple[int, ...]], limit: int) -> None:
        """Check that what was found is correct, and that the block after it is not cached."""
        nothing = (NOT_HERE,) * len(self.groups)
        for i, ids in enumerate((*found, nothing)[:limit]):
            content = self._content(seq, i)
            assert len(ids) == len(self.groups), (
                f"block {i} was found in {len(ids)} of {len(self.groups)} KV groups"
            )
            assert i == len(found) or any(ids), f"entry {i} of the result has no block"
            for group, (block, blocks) in enumerate(zip(ids, self.groups, strict=True)):
                if block != NOT_HERE:
                    held = blocks.holds.get(block)
                    assert held == content, (
                        f"block {block} of group {group} was found for {content}, but has {held}"
                    )
                    continue
                alone = [b for b, held in blocks.holds.items() if held == content]
                is_sure = len(alone) == 1 and content not in blocks.ambiguous
                assert not is_sure, (
                    f"block {alone} of group {group} contains {content}, but was not found"
                )

    def _content(self, seq: Sequence, i: int) -> Content:
        return (seq.request.adapter_id, seq.request.cache_salt, *seq.tokens[: (i + 1) * self.size])

    def _heads(self, found: list[tuple[int, ...]]) -> list[list[int]]:
        """Return the longest usable prefix by group, with the null block where a window does not
        need one."""
        count = 0
        for i, ids in enumerate(found, 1):
            if ids[0] == NOT_HERE:
                break
            if all(block != NOT_HERE for block in ids):
                count = i
        return [
            [
                ids[group] if group == 0 or i == count - 1 else NOT_HERE
                for i, ids in enumerate(found[:count])
            ]
            for group, _ in enumerate(self.groups)
        ]

    def _fill(self, seq: Sequence, gaps: set[int]) -> bool:
        """Compute the blocks that the sequence's tokens fill, and insert them; return False if
        there are not enough blocks. In the group with a window, the new blocks numbered in `gaps`
        have already left it."""
        tables = self.tables[seq.seq_id]
        first = len(tables[0])
        count = len(seq.tokens) // self.size - first
        for group, blocks in enumerate(self.groups):
            self._evict(group, count)
            if count > len(blocks.free):
                return False
        if count <= 0:
            return True
        new = [
            [NOT_HERE if group and i in gaps else blocks.free.pop() for i in range(count)]
            for group, blocks in enumerate(self.groups)
        ]
        for table, added in zip(tables, new, strict=True):
            table += added
        self._insert(seq, first, new)
        return True

    def _evict(self, group: int, need: int) -> None:
        blocks = self.groups[group]
        count = min(need - len(blocks.free), len(blocks.evictable))
        if count > 0:
            evicted = self.cache.evict(group, count)
            assert len(set(evicted)) == len(evicted) == count, (
                f"{count} blocks were to be evicted, but evict returned {evicted}"
            )
            assert set(evicted) <= blocks.evictable, (
                f"evict returned {sorted(set(evicted) - blocks.evictable)}, which are not evictable"
            )
            blocks.evictable -= set(evicted)
            blocks.free |= set(evicted)
            for block in evicted:
                del blocks.holds[block]

    def _insert(self, seq: Sequence, first: int, new: list[list[int]]) -> None:
        for blocks, ids in zip(self.groups, new, strict=True):
            for i, block in enumerate(ids, first):
                content = self._content(seq, i)
                if block != NOT_HERE:
                    if any(held == content for b, held in blocks.holds.items() if b != block):
                        blocks.ambiguous.add(content)
                    blocks.holds[block] = content
        self.cache.insert(seq, first, [list(ids) for ids in new])
        self._has_come(seq, first, len(new[0]))

    @operation(
        which=st.integers(0, 9),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4),
        gaps=st.booleans(),
    )
    def grow(self, which: int, tokens: list[int], gaps: bool) -> None:
        if self.sequences:
            seq = self._known(which)
            seq.tokens += tokens
            self._fill(seq, {0} if gaps else set())

    @operation(which=st.integers(0, 9), more=st.lists(st.integers(0, 1), max_size=3))
    def share(self, which: int, more: list[int]) -> None:
        """Let another sample of the request share its blocks, and insert them again."""
        if not self.sequences:
            return
        source = self._known(which)
        tables = self.tables[source.seq_id]
        if not tables[0] or any(NOT_HERE in table for table in tables):
            return
        r = source.request
        tokens = source.tokens[: len(tables[0]) * self.size] + more
        seq = self._new_sequence(tokens, r.cache_salt, r.adapter_id)
        self.sequences[seq.seq_id], self.tables[seq.seq_id] = seq, [list(table) for table in tables]
        self._insert(seq, 0, tables)

    @operation(which=st.integers(0, 9))
    def trim(self, which: int) -> None:
        """Remove the first block of the window from the table."""
        if self.sequences:
            for group, table in enumerate(self.tables[self._known(which).seq_id][1:], 1):
                here = [i for i, block in enumerate(table) if block != NOT_HERE]
                if here:
                    block, table[here[0]] = table[here[0]], NOT_HERE
                    self._drop(group, block)

    @operation(which=st.integers(0, 9))
    def end_one(self, which: int) -> None:
        if self.sequences:
            self._end(self._known(which).seq_id)

    def _known(self, which: int) -> Sequence:
        return list(self.sequences.values())[which % len(self.sequences)]

    def _end(self, seq_id: int) -> None:
        for group, table in enumerate(self.tables.pop(seq_id)):
            for block in reversed(table):
                if block != NOT_HERE:
                    self._drop(group, block)
        del self.sequences[seq_id]
        self.coming.pop(seq_id, None)
        self.cache.forget(seq_id)

    def _drop(self, group: int, block: int) -> None:
        """Drop a sequence's reference to a block."""
        blocks = self.groups[group]
        if any(block in tables[group] for tables in self.tables.values()):
            return
        if self.cache.keep(group, block):
            assert block in blocks.holds, (
                f"keep returned True for block {block} of group {group}, which is not cached"
            )
            blocks.evictable.add(block)
        else:
            content = blocks.holds.pop(block, None)
            is_sure = content is not None and content not in blocks.ambiguous
            assert not is_sure, (
                f"keep returned False for block {block} of group {group}, which caches {content}"
            )
            blocks.free.add(block)

    @operation()
    def reset(self) -> None:
        """Reset the cache. Blocks in use are not cached any more; their sequences continue, and
        insert the blocks that they compute from now on."""
        self.cache.reset()
        self.coming.clear()
        for blocks in self.groups:
            blocks.free |= blocks.evictable
            blocks.evictable.clear()
            blocks.holds.clear()
            blocks.ambiguous.clear()

    def end(self) -> None:
        for seq_id in list(self.sequences):
            self._end(seq_id)
        for group, blocks in enumerate(self.groups):
            self._evict(group, len(blocks.free) + len(blocks.evictable))
            assert not blocks.evictable
