"""Which block holds the KV of which tokens, by chained hashes.

A block's key is a keyed 128-bit BLAKE2b hash (RFC 7693) of the key of the block before it and of its own tokens; the
first one's predecessor is the hash of adapter and salt. So a key stands for all tokens up to the end of its block. The
secret is drawn anew for every index: nobody can choose tokens that collide. A hit is verified all the same: an entry keeps
its tokens and its predecessor's key, and both are compared.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence as Counts
from hashlib import blake2b

from dovetail.errors import PluginError
from dovetail.interfaces.prefix_cache import NOT_HERE
from dovetail.sequence import Sequence
from dovetail.types import Request
from dovetail_prefix_cache.eviction import EvictionPolicy, MakePolicy

TOKEN = array("I")
KEY_BYTES = 16


class Entry:
    """One block's worth of tokens, and where its KV is."""

    __slots__ = ("block_ids", "key", "parent", "tokens")

    def __init__(self, key: bytes, parent: bytes, tokens: bytes, num_groups: int) -> None:
        self.key, self.parent, self.tokens = key, parent, tokens
        self.block_ids = [NOT_HERE] * num_groups


class HashIndex:
    """A `TieredPrefixCache`; the interface says what each method promises."""

    def __init__(
        self, block_size: int, num_blocks: list[int], make_policy: MakePolicy, named: str | None = None,
        num_host_blocks: Counts = (),
    ) -> None:  # fmt: skip
        """`named`: who the policy is, for errors. `num_host_blocks`: of the host tier, if there is one."""
        self._named = named
        self._block_size = block_size
        self._secret = os.urandom(32)
        self._entries: dict[bytes, Entry] = {}
        all_blocks = [n + h for n, h in zip(num_blocks, num_host_blocks or [0] * len(num_blocks), strict=True)]
        self._entry_of: list[list[Entry | None]] = [[None] * n for n in all_blocks]
        """By KV group and block."""
        self._policies = [make_policy(n) for n in num_blocks]
        self._num_blocks = num_blocks
        self._host_policies = [make_policy(n) for n in all_blocks] if num_host_blocks else []
        self._chains: dict[int, list[bytes]] = {}
        """By sequence: the keys of its first blocks, after the root."""
        self._expected: dict[bytes, int] = {}
        """Keys of blocks that running sequences are about to compute, and which of them does."""
        self._coming: dict[int, tuple[int, int]] = {}
        """By running sequence: the first block that it has not inserted yet, and the end of those expected."""

    def match(self, seq: Sequence, num_blocks: int) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        chain = self._chain(seq)
        for i, own in enumerate(self._blocks_of(seq, 0, num_blocks)):
            if i + 1 == len(chain):
                chain.append(self._hash(chain[i] + own))
            entry = self._entries.get(chain[i + 1])
            if entry is None or entry.tokens != own or entry.parent != chain[i]:
                break
            found.append(tuple(entry.block_ids))
        return found

    def insert(self, seq: Sequence, first: int, block_ids: list[list[int]]) -> None:
        end = first + len(block_ids[0])
        chain = self._chain(seq, first)
        self._no_longer_expect(seq.seq_id, end)
        for i, own in enumerate(self._blocks_of(seq, first, end), first):
            if i + 1 == len(chain):
                chain.append(self._hash(chain[i] + own))
            key = chain[i + 1]
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = Entry(key, chain[i], own, len(block_ids))
            elif entry.tokens != own or entry.parent != chain[i]:
                continue  # another block of the same hash: the first one stays
            for group, blocks in enumerate(block_ids):
                block = blocks[i - first]
                if block != NOT_HERE and entry.block_ids[group] == NOT_HERE:
                    entry.block_ids[group] = block
                    self._entry_of[group][block] = entry
            if not any(entry.block_ids):
                del self._entries[key]  # wholly behind the windows of all groups

    def expect(self, seq: Sequence, first: int, end: int) -> None:
        for key in self._chain(seq, end)[first + 1 : end + 1]:
            self._expected.setdefault(key, seq.seq_id)
        self._coming[seq.seq_id] = first, end

    def expected_from(self, seq: Sequence, block: int) -> int | None:
        return self._expected.get(self._chain(seq, block + 1)[block + 1])

    def _no_longer_expect(self, seq_id: int, before: int | None = None) -> None:
        """Blocks of `seq_id`: those before `before`, or all."""
        first, end = self._coming.pop(seq_id, (0, 0))
        stop = end if before is None else min(end, before)
        for key in self._chains[seq_id][first + 1 : stop + 1] if first < stop else ():
            if self._expected.get(key) == seq_id:
                del self._expected[key]
        if stop < end:
            self._coming[seq_id] = max(first, stop), end

    def claim(self, group: int, block_ids: list[int]) -> None:
        count = self._num_blocks[group]
        for block in block_ids:
            (self._policies if block < count else self._host_policies)[group].remove(block)

    def keep(self, group: int, block_id: int) -> bool:
        if self._entry_of[group][block_id] is None:
            return False
        self._policies[group].add(block_id)
        return True

    def evict(self, group: int, count: int) -> list[int]:
        return self._forget_least(group, count, self._policies[group])

    def evict_host(self, group: int, count: int) -> list[int]:
        return self._forget_least(group, count, self._host_policies[group])

    def _forget_least(self, group: int, count: int, policy: EvictionPolicy) -> list[int]:
        blocks = [policy.pop() for _ in range(count)]
        for block in blocks:
            entry = self._entry_in(group, block)
            self._entry_of[group][block] = None
            entry.block_ids[group] = NOT_HERE
            if not any(entry.block_ids):
                del self._entries[entry.key]
        return blocks

    def demote(self, group: int, host_blocks: list[int]) -> list[int]:
        blocks = [self._policies[group].pop() for _ in host_blocks]
        self._move(group, blocks, host_blocks)
        for block in host_blocks:
            self._host_policies[group].add(block)
        return blocks

    def promote(self, group: int, host_blocks: list[int], block_ids: list[int]) -> None:
        self._move(group, host_blocks, block_ids)

    def _move(self, group: int, sources: list[int], targets: list[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            entry = self._entry_in(group, source)
            entry.block_ids[group] = target
            self._entry_of[group][source], self._entry_of[group][target] = None, entry

    def _entry_in(self, group: int, block: int) -> Entry:
        """What a block holds that a policy has given up."""
        entry_of = self._entry_of[group]
        entry = entry_of[block] if type(block) is int and 0 <= block < len(entry_of) else None
        if entry is None:
            raise PluginError(f"the eviction policy gave up {block!r}, no block that is kept", provider=self._named)
        return entry

    def forget(self, seq_id: int) -> None:
        self._no_longer_expect(seq_id)
        self._chains.pop(seq_id, None)

    def reset(self) -> None:
        self._entries.clear()
        self._expected.clear()
        self._coming.clear()
        self._entry_of = [[None] * len(of) for of in self._entry_of]
        for policy in (*self._policies, *self._host_policies):
            policy.clear()

    def _chain(self, seq: Sequence, num_blocks: int = 0) -> list[bytes]:
        """The keys of a sequence, of its first `num_blocks` blocks at least."""
        chain = self._chains.get(seq.seq_id)
        if chain is None:
            chain = self._chains[seq.seq_id] = [self._root(seq.request)]
        known = len(chain) - 1
        if known < num_blocks:
            for own in self._blocks_of(seq, known, num_blocks):
                chain.append(self._hash(chain[-1] + own))
        return chain

    def _root(self, request: Request) -> bytes:
        """What the first block's key depends on beside its tokens."""
        return self._hash(repr((request.adapter_id, request.cache_salt)).encode())

    def _blocks_of(self, seq: Sequence, begin: int, end: int) -> list[bytes]:
        """The tokens of blocks `begin … end - 1`."""
        size, width = self._block_size, self._block_size * TOKEN.itemsize
        data = array("I", seq.tokens[begin * size : end * size]).tobytes()
        return [data[at : at + width] for at in range(0, len(data), width)]

    def _hash(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=KEY_BYTES, key=self._secret).digest()
