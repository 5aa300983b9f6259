"""Map token prefixes to the blocks with their KV, by chained hashes.

A block's key is the 128-bit BLAKE2b hash (RFC 7693) of the previous block's key and its own tokens.
The first block's predecessor is the hash of adapter and salt, keyed with a secret that is random
for every index. A key thus identifies all tokens up to the end of its block, and without the secret
nobody can choose tokens that collide. Hits are verified nevertheless: an entry keeps its tokens and
its predecessor's key, and both are compared.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence as Counts
from hashlib import blake2b
from typing import Any

from dovetail.errors import PluginError
from dovetail.interfaces.prefix_cache import NOT_HERE
from dovetail.sequence import Sequence
from dovetail.types import Request
from dovetail_prefix_cache.eviction import EvictionPolicy, MakePolicy

TOKEN = array("I")
KEY_BYTES = 16


Entry = tuple[Any, ...]
"""The tokens of one block, the key of the previous block, and the id of the block with their KV in
each KV group.

There may be a million entries, and Python's garbage collector does not track tuples of bytes and
numbers.
"""


class Chain:
    """The first blocks of a sequence, as far as they have been looked up."""

    __slots__ = ("keys", "tokens")

    def __init__(self, root: bytes) -> None:
        self.keys = [root]
        """Keys of the root, the first block, the second block, …"""
        self.tokens: list[bytes] = []


class HashIndex:
    """The `TieredPrefixCache` by hashes. The interface documents the methods."""

    def __init__(
        self,
        block_size: int,
        num_blocks: list[int],
        make_policy: MakePolicy,
        named: str | None = None,
        num_host_blocks: Counts[int] = (),
    ) -> None:
        """`named` is the name of the policy's provider, for error messages. `num_host_blocks` are
        the blocks of the host tier, if there is one."""
        self._named = named
        self._block_size = block_size
        self._secret = os.urandom(32)
        self._entries: dict[bytes, Entry] = {}
        all_blocks = [
            n + h for n, h in zip(num_blocks, num_host_blocks or [0] * len(num_blocks), strict=True)
        ]
        self._key_of: list[list[bytes | None]] = [[None] * n for n in all_blocks]
        """Key of the content of each block, by KV group and block id."""
        self._policies = [make_policy(n) for n in num_blocks]
        self._num_blocks = num_blocks
        self._host_policies = [make_policy(n) for n in all_blocks] if num_host_blocks else []
        self._chains: dict[int, Chain] = {}
        """Chain of each sequence."""
        self._expected: dict[bytes, int] = {}
        """Keys of blocks that running sequences are about to compute, with the id of the sequence
        that does."""
        self._coming: dict[int, tuple[int, int]] = {}
        """For each running sequence, the first block that it has not inserted yet and the end of
        its expected blocks."""

    def match(self, seq: Sequence, num_blocks: int) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        chain, entries = self._chain(seq, 0), self._entries
        self._cut(chain, seq, num_blocks)
        keys = chain.keys
        for i, own in enumerate(chain.tokens[:num_blocks]):
            if i + 1 == len(keys):  # hash no further than the first miss
                keys.append(self._hash(keys[i], own))
            entry = entries.get(keys[i + 1])
            if entry is None or entry[0] != own or entry[1] != keys[i]:
                break
            found.append(entry[2:])
        return found

    def insert(self, seq: Sequence, first: int, block_ids: list[list[int]]) -> None:
        end = first + len(block_ids[0])
        chain, entries = self._chain(seq, end), self._entries
        self._no_longer_expect(seq.seq_id, end)
        keys, tokens = chain.keys, chain.tokens
        for i, blocks in enumerate(zip(*block_ids, strict=True), first):
            key = keys[i + 1]
            entry = entries.get(key)
            if entry is None:
                if not any(blocks):
                    continue  # entirely before the windows of all groups
                entries[key] = (tokens[i], keys[i], *blocks)
                for key_of, block in zip(self._key_of, blocks, strict=True):
                    if block != NOT_HERE:
                        key_of[block] = key
            # Otherwise the hashes collide, and the first entry is kept.
            elif entry[0] == tokens[i] and entry[1] == keys[i]:
                for group, block in enumerate(blocks):
                    if block != NOT_HERE and entry[2 + group] == NOT_HERE:
                        self._put(key, group, block)

    def expect(self, seq: Sequence, first: int, end: int) -> None:
        self._expected.update(
            dict.fromkeys(self._chain(seq, end).keys[first + 1 : end + 1], seq.seq_id)
        )
        self._coming[seq.seq_id] = first, end

    def expected_from(self, seq: Sequence, block: int) -> int | None:
        return self._expected.get(self._chain(seq, block + 1).keys[block + 1])

    def _no_longer_expect(self, seq_id: int, before: int | None = None) -> None:
        """Drop the expected blocks of a sequence: those before block `before`, or all."""
        coming = self._coming.get(seq_id)
        if coming is None:
            return
        first, end = coming
        stop = end if before is None else min(end, before)
        for key in self._chains[seq_id].keys[first + 1 : stop + 1]:
            self._expected.pop(key, None)
        if stop < end:
            self._coming[seq_id] = max(first, stop), end
        else:
            del self._coming[seq_id]

    def claim(self, group: int, block_ids: list[int]) -> None:
        count = self._num_blocks[group]
        for block in block_ids:
            (self._policies if block < count else self._host_policies)[group].remove(block)

    def keep(self, group: int, block_id: int) -> bool:
        if self._key_of[group][block_id] is None:
            return False
        self._policies[group].add(block_id)
        return True

    def evict(self, group: int, count: int) -> list[int]:
        return self._evict(group, count, self._policies[group])

    def evict_host(self, group: int, count: int) -> list[int]:
        return self._evict(group, count, self._host_policies[group])

    def _evict(self, group: int, count: int, policy: EvictionPolicy) -> list[int]:
        blocks = [policy.pop() for _ in range(count)]
        for block in blocks:
            key = self._take_out(group, block)
            if len(self._key_of) == 1:
                del self._entries[key]
            else:
                self._put(key, group, NOT_HERE)
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
            self._put(self._take_out(group, source), group, target)

    def _take_out(self, group: int, block: int) -> bytes:
        """Clear a block that a policy has evicted. Returns the key of its content."""
        key_of = self._key_of[group]
        key = key_of[block] if type(block) is int and 0 <= block < len(key_of) else None
        if key is None:
            raise PluginError(
                f"the eviction policy returned {block!r}, which is not a cached block",
                provider=self._named,
            )
        key_of[block] = None
        return key

    def _put(self, key: bytes, group: int, block: int) -> None:
        """Set the block with the content of `key` in a KV group, or `NOT_HERE`. An entry without
        blocks is deleted."""
        if block != NOT_HERE:
            self._key_of[group][block] = key
        entry = self._entries[key]
        ids = (*entry[2 : 2 + group], block, *entry[3 + group :])
        if any(ids):
            self._entries[key] = (*entry[:2], *ids)
        else:
            del self._entries[key]

    def forget(self, seq_id: int) -> None:
        self._no_longer_expect(seq_id)
        self._chains.pop(seq_id, None)

    def reset(self) -> None:
        self._entries.clear()
        self._expected.clear()
        self._coming.clear()
        self._key_of = [[None] * len(of) for of in self._key_of]
        for policy in (*self._policies, *self._host_policies):
            policy.clear()

    def _chain(self, seq: Sequence, num_blocks: int) -> Chain:
        """Return the chain of a sequence with the keys of at least its first `num_blocks`
        blocks."""
        chain = self._chains.get(seq.seq_id)
        if chain is None:
            chain = self._chains[seq.seq_id] = Chain(self._root(seq.request))
        if len(chain.keys) <= num_blocks:
            self._cut(chain, seq, num_blocks)
            keys, key = chain.keys, chain.keys[-1]
            for own in chain.tokens[len(keys) - 1 : num_blocks]:
                key = self._hash(key, own)
                keys.append(key)
        return chain

    def _cut(self, chain: Chain, seq: Sequence, num_blocks: int) -> None:
        """Add the tokens of a sequence's first `num_blocks` blocks to its chain."""
        known = len(chain.tokens)
        if known < num_blocks:
            size, width = self._block_size, self._block_size * TOKEN.itemsize
            data = array("I", seq.tokens[known * size : num_blocks * size]).tobytes()
            chain.tokens += [data[at : at + width] for at in range(0, len(data), width)]

    def _root(self, request: Request) -> bytes:
        """Return the predecessor key of the first block."""
        data = repr((request.adapter_id, request.cache_salt)).encode()
        return blake2b(data, digest_size=KEY_BYTES, key=self._secret).digest()

    @staticmethod
    def _hash(parent: bytes, tokens: bytes) -> bytes:
        return blake2b(parent + tokens, digest_size=KEY_BYTES).digest()
