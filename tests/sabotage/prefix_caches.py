"""Mistakes that prefix caches make, over the hash index."""

from __future__ import annotations

from types import SimpleNamespace

from dovetail.interfaces.prefix_cache import NOT_HERE
from dovetail_prefix_cache import dovetail_eviction_policies, dovetail_prefix_caches
from dovetail_prefix_cache.index import HashIndex
from sabotage import Sabotages

LRU, _ = dovetail_eviction_policies()
SABOTAGES = Sabotages("prefix_cache", dovetail_prefix_caches()[0], inner={"eviction": LRU})
BOOKS, FOUND, APART, RESET, ENGINE, REUSE = (
    "test_bookkeeping_is_consistent",
    "test_what_was_computed_is_found",
    "test_nothing_is_shared_across_salts_and_adapters",
    "test_reset_forgets_everything",
    "test_engine_invariants_hold",
    "test_reuse_changes_no_output",
)
sabotage = SABOTAGES.of_class(
    lambda cls, context, o: cls(
        context.kv_groups[0].block_size,
        list(context.num_blocks),
        context.build("eviction"),
        None,
        context.num_host_blocks,
    )
)


def masked(seq, bits):
    """A sequence of which the last bits of every token are left."""
    return SimpleNamespace(tokens=[token & bits for token in seq.tokens])


class Unverified(HashIndex):
    """A hit is taken on the hash alone."""

    def match(self, seq, num_blocks):
        found = []
        for key in self._chain(seq, num_blocks).keys[1 : num_blocks + 1]:
            if key not in self._entries:
                break
            found.append(self._entries[key][2:])
        return found


@sabotage(BOOKS, REUSE)
class StaleAfterEvict(HashIndex):
    """What is evicted can still be found."""

    def evict(self, group, count):
        return [self._policies[group].pop() for _ in range(count)]


@sabotage(BOOKS, ENGINE)
class EvictsBlocksInUse(HashIndex):
    """A block that is in use again stays in the eviction order."""

    def claim(self, group, block_ids):
        pass


@sabotage(APART, BOOKS)
class SaltIgnored(HashIndex):
    """The salt is not part of the key."""

    def _root(self, request):
        return self._hash(self._secret, repr(request.adapter_id).encode())


@sabotage(APART, BOOKS)
class AdapterIgnored(HashIndex):
    """The adapter is not part of the key."""

    def _root(self, request):
        return self._hash(self._secret, repr(request.cache_salt).encode())


@sabotage(APART)
class SaltAndAdapterJoined(HashIndex):
    """Adapter and salt are joined without saying where one ends, and None is the empty string."""

    def _root(self, request):
        return self._hash(
            self._secret, f"{request.adapter_id or ''}{request.cache_salt or ''}".encode()
        )


@sabotage(BOOKS, REUSE)
class OwnTokensOnly(Unverified):
    """A block's key is the hash of its own tokens, without those before it."""

    @staticmethod
    def _hash(parent, tokens):
        return HashIndex._hash(b"", tokens)


@sabotage(BOOKS)
class ChainOfTwo(Unverified):
    """A block's key covers the block before it, and none before that."""

    @staticmethod
    def _hash(parent, tokens):
        return parent[-len(tokens) :] + tokens


@sabotage(BOOKS, REUSE)
class WeakHash(Unverified):
    """The hash has 4 bits, and a hit is taken on the hash alone."""

    @staticmethod
    def _hash(parent, tokens):
        return bytes([HashIndex._hash(parent, tokens)[0] & 15])


@sabotage(BOOKS)
class TokensOfOneByte(HashIndex):
    """Of a token id the last byte is looked at."""

    def _cut(self, chain, seq, num_blocks):
        super()._cut(chain, masked(seq, 255), num_blocks)


@sabotage(BOOKS)
class TokensOfTwoBytes(HashIndex):
    """Of a token id the last two bytes are looked at."""

    def _cut(self, chain, seq, num_blocks):
        super()._cut(chain, masked(seq, 65_535), num_blocks)


@sabotage(BOOKS)
class KeepsTheUnknown(HashIndex):
    """Every block is kept, also one that was never inserted."""

    def keep(self, group, block_id):
        self._policies[group].add(block_id)
        return True

    def evict(self, group, count):
        blocks = []
        while len(blocks) < count:
            blocks.append(self._policies[group].pop())
            if self._key_of[group][blocks[-1]] is not None:
                self._put(self._take_out(group, blocks[-1]), group, NOT_HERE)
        return blocks


@sabotage(BOOKS)
class KeepsNothing(HashIndex):
    """A block is known as long as it is in use, and its end is not noticed."""

    def keep(self, group, block_id):
        return False


@sabotage(FOUND, BOOKS)
class NeverFinds(HashIndex):
    """Nothing is ever found."""

    def match(self, seq, num_blocks):
        return []


@sabotage(FOUND, BOOKS)
class LosesTheLastBlock(HashIndex):
    """The last block of what is known is not found."""

    def match(self, seq, num_blocks):
        return super().match(seq, num_blocks)[:-1]


@sabotage(BOOKS)
class FindsTooMuch(HashIndex):
    """All that is known is found, however little was asked for."""

    def match(self, seq, num_blocks):
        return super().match(seq, len(seq.tokens) // self._block_size + 1)


@sabotage(BOOKS)
class FindsAsFarAsItGoes(HashIndex):
    """Where the match ends, entries without a block follow."""

    def match(self, seq, num_blocks):
        found = super().match(seq, num_blocks)
        return found + [(NOT_HERE,) * len(self._policies)] * (num_blocks - len(found))


@sabotage(FOUND, BOOKS)
class ForgetsWithTheSequence(HashIndex):
    """What a sequence inserted is forgotten when it ends."""

    def forget(self, seq_id):
        for key in self._chains[seq_id].keys if seq_id in self._chains else ():
            self._entries.pop(key, None)
        super().forget(seq_id)


@sabotage(BOOKS, ENGINE)
class EvictsOneTooFew(HashIndex):
    """When many blocks are to be evicted, one of them is not."""

    def evict(self, group, count):
        return super().evict(group, count - (count > 1))


@sabotage(BOOKS, ENGINE)
class EvictsOneTwice(HashIndex):
    """When many blocks are to be evicted, the first is named twice."""

    def evict(self, group, count):
        blocks = super().evict(group, count)
        return [*blocks[:-1], blocks[0]]


@sabotage(RESET, BOOKS)
class ResetKeepsItsEntries(HashIndex):
    """After a reset blocks can still be found."""

    def reset(self):
        for policy in self._policies:
            policy.clear()


@sabotage(BOOKS)
class ResetKeepsTheOrder(HashIndex):
    """A reset leaves the eviction order as it was."""

    def reset(self):
        self._entries.clear()
        self._key_of = [[None] * len(of) for of in self._key_of]


@sabotage(BOOKS)
class KeepsAfterReset(HashIndex):
    """Blocks that were in use at a reset are kept when they are given back."""

    def reset(self):
        self._entries.clear()
        for policy in self._policies:
            policy.clear()


@sabotage(BOOKS)
class LaterWins(HashIndex):
    """When a block becomes known a second time, the first one is forgotten by half."""

    def insert(self, seq, first, block_ids):
        super().insert(seq, first, block_ids)
        keys = self._chains[seq.seq_id].keys
        for group, blocks in enumerate(block_ids):
            for i, block in enumerate(blocks, first):
                if block != NOT_HERE:
                    self._put(keys[i + 1], group, block)


@sabotage(BOOKS)
class OneOrderForAllGroups(HashIndex):
    """The KV groups share one eviction order."""

    def __init__(self, block_size, num_blocks, make_policy, *more):
        super().__init__(block_size, num_blocks, make_policy, *more)
        self._policies = [make_policy(max(num_blocks))] * len(num_blocks)


@sabotage(BOOKS)
class GapsEndTheInsert(HashIndex):
    """Blocks after one that fell out of a window are not inserted."""

    def insert(self, seq, first, block_ids):
        gaps = [blocks.index(NOT_HERE) for blocks in block_ids if NOT_HERE in blocks]
        super().insert(
            seq, first, [blocks[: min(gaps)] if gaps else blocks for blocks in block_ids]
        )


@sabotage(BOOKS)
class AllGroupsOrNone(HashIndex):
    """A block that one KV group does not know is found in none."""

    def match(self, seq, num_blocks):
        found = super().match(seq, num_blocks)
        known = [all(ids) for ids in found]
        return found[: known.index(False)] if False in known else found


@sabotage("test_two_engines_do_not_meet")
class StateOfTheClass(HashIndex):
    """What is known is kept by the class: two engines of one process share it."""

    shared = {}  # noqa: RUF012

    def __init__(self, block_size, num_blocks, make_policy, *more):
        super().__init__(block_size, num_blocks, make_policy, *more)
        self._entries, self._secret = self.shared, bytes(32)


COMES, FAILED = "test_what_comes_together_is_computed_once", "test_what_failed_is_never_found"


@sabotage(COMES, BOOKS)
class ExpectsNothing(HashIndex):
    """Nobody is told that a block is being computed."""

    def expect(self, seq, first, end):
        pass


@sabotage(BOOKS)
class ExpectsForEver(HashIndex):
    """A sequence that has left is still expected to compute its blocks."""

    def _no_longer_expect(self, seq_id, before=None):
        pass


@sabotage(BOOKS)
class ExpectsAfterReset(HashIndex):
    """A reset leaves what is expected as it was."""

    def reset(self):
        expected, coming = dict(self._expected), dict(self._coming)
        super().reset()
        self._expected, self._coming = expected, coming


@sabotage(BOOKS)
class ExpectsTheBlockBefore(HashIndex):
    """Of the blocks that a sequence computes, the last one is not expected."""

    def expect(self, seq, first, end):
        super().expect(seq, first, end - 1)


@sabotage(FAILED, REUSE)
class FindsWhatIsExpected(HashIndex):
    """A block can be found as soon as it is said to be computed."""

    def expect(self, seq, first, end):
        super().expect(seq, first, end)
        self._promised = set(self._chain(seq, end).keys[first + 1 : end + 1])

    def match(self, seq, num_blocks):
        found, keys = super().match(seq, num_blocks), self._chain(seq, num_blocks).keys
        promised = getattr(self, "_promised", set())
        while found and len(found) < num_blocks and keys[len(found) + 1] in promised:
            found.append(found[-1])
        return found


TIER = "test_a_host_tier_changes_no_output"


@sabotage(TIER)
class DemotesInAnotherOrder(HashIndex):
    """Blocks that are moved to the host are told in another order than that of the host blocks."""

    def demote(self, group, host_blocks):
        return super().demote(group, host_blocks)[::-1]


@sabotage("test_what_the_host_has_room_for_is_found_again")
class ForgetsWhatIsMoved(HashIndex):
    """What is moved to the host cannot be found there."""

    def demote(self, group, host_blocks):
        blocks = super().demote(group, host_blocks)
        for block in host_blocks:
            self._put(self._key_of[group][block], group, NOT_HERE)
        return blocks


@sabotage(TIER)
class PromotedAndStillInTheOrder(HashIndex):
    """A host block whose contents have moved to the device stays in the host's order of
    eviction."""

    def claim(self, group, block_ids):
        super().claim(group, block_ids)
        for block in block_ids:
            if block >= self._num_blocks[group]:
                self._host_policies[group].add(block)
