"""Provide a worker without a model. It has a real paged cache of token ids, and every sampled token
depends on what it reads there.

A block that is leaked, shared incorrectly or written by the wrong sequence therefore changes the
output, and a test that compares outputs detects it. It is also the smallest example of a worker.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
from dataclasses import dataclass, field
from typing import Any

from dovetail.errors import StepFailed
from dovetail.interfaces.clock import Clock, SystemClock
from dovetail.interfaces.worker import Progress
from dovetail.types import (
    DRAFTED_BY_WORKER,
    KVGroup,
    SequenceStart,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

POISON = -1


@dataclass
class Faults:
    """Faults to inject, by the number of steps submitted so far, and delays."""

    raise_at: int | None = None
    exit_at: int | None = None
    hang_at: int | None = None
    step_seconds: float = 0.0
    load_seconds: float = 0.0


@dataclass
class _Known:
    start: SequenceStart
    tokens: list[int]
    tables: list[list[int]] = field(default_factory=list)


class SimulatedWorker:
    """A worker that samples `hash(seed, sample index, all tokens as read from the cache) %
    vocab_size`; greedy sampling ignores the seed."""

    def __init__(
        self,
        groups: list[KVGroup],
        vocab_size: int = 64,
        memory: int = 1 << 30,
        faults: Faults | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Create a worker whose delays pass on `clock`; by default the machine's."""
        self._clock = SystemClock() if clock is None else clock
        self._groups = groups
        self.vocab_size = vocab_size
        self._memory = memory
        self._faults = faults or Faults()
        self._cache: list[list[int]] = []
        self._host: list[list[int]] = []
        self._known: dict[int, _Known] = {}
        self.num_steps = 0
        self.closed = False

    def load(self, progress: Progress) -> None:
        self._clock.sleep(self._faults.load_seconds)
        progress("loading weights", 1, 1)

    def kv_groups(self) -> list[KVGroup]:
        return self._groups

    def kv_memory(self) -> int:
        return self._memory

    def allocate(self, num_blocks: list[int]) -> None:
        self._cache = [
            [POISON] * (n * g.block_size) for n, g in zip(num_blocks, self._groups, strict=True)
        ]

    def allocate_host(self, num_blocks: list[int]) -> None:
        self._host = [
            [POISON] * (n * g.block_size) for n, g in zip(num_blocks, self._groups, strict=True)
        ]

    def warm_up(self, progress: Progress) -> None:
        progress("warming up", 1, 1)

    def submit(self, plan: StepPlan) -> StepResult:
        self._update(plan)
        self.num_steps += 1
        self._misbehave()
        self._move(plan)
        rows = list(zip(plan.seq_ids, plan.num_computed, plan.num_tokens, strict=True))
        drafts = [list(draft) for draft in plan.draft_token_ids] or [[] for _ in rows]
        for (seq_id, _, _), draft in zip(rows, drafts, strict=True):
            if DRAFTED_BY_WORKER in draft:
                draft[:] = self._drafted(seq_id, len(draft))
            self._known[seq_id].tokens += draft
        for seq_id, first, count in rows:  # all writes before any read
            for position in range(first, first + count):
                for group, slot in self._slots(seq_id, position):
                    self._cache[group][slot] = self._known[seq_id].tokens[position]
        sampled = [
            self._verify(seq_id, first + count, draft) if samples else []
            for (seq_id, first, count), samples, draft in zip(
                rows, plan.samples, drafts, strict=True
            )
        ]
        result = StepResult(plan.step_id, sampled)
        asked = [self._known[i].start.params for i in plan.seq_ids]
        if any(p.logprobs is not None or p.prompt_logprobs is not None for p in asked):
            self._add_logprobs(rows, drafts, result)
        for seq_id, tokens, draft in zip(plan.seq_ids, sampled, drafts, strict=True):
            known = self._known[seq_id]
            known.tokens = known.tokens[: len(known.tokens) - len(draft)] + tokens
        return result

    def sample(self, handle: Any, masks: dict[int, bytes] | None = None) -> StepResult:
        result: StepResult = handle
        return result

    def close(self) -> None:
        self.closed = True

    def _update(self, plan: StepPlan) -> None:
        for seq_id in plan.released:
            self._known.pop(seq_id, None)
        for start in plan.starts:
            assert start.seq_id not in self._known, "a sequence was started twice"
            self._known[start.seq_id] = _Known(
                start, list(start.token_ids), [list(b) for b in start.block_ids]
            )
        for seq_id, added in zip(plan.seq_ids, plan.new_block_ids, strict=True):
            for table, blocks in zip(self._known[seq_id].tables, added, strict=bool(added)):
                assert 0 not in blocks, "the null block was allocated"
                table += blocks

    def _move(self, plan: StepPlan) -> None:
        for op in plan.block_ops:
            source, target = (
                (self._host, self._cache) if op.kind == "in" else (self._cache, self._host)
            )
            size = self._groups[op.group].block_size
            moved = source[op.group][op.src * size : (op.src + 1) * size]
            assert len(moved) == size, f"{op} moves a block that does not exist"
            target[op.group][op.dst * size : (op.dst + 1) * size] = moved

    def _slots(self, seq_id: int, position: int) -> list[tuple[int, int]]:
        tables = self._known[seq_id].tables
        return [
            (i, tables[i][position // g.block_size] * g.block_size + position % g.block_size)
            for i, g in enumerate(self._groups)
        ]

    def _verify(self, seq_id: int, length: int, draft: list[int]) -> list[int]:
        """Sample the row's tokens, up to the first that differs from the draft."""
        assert length == len(self._known[seq_id].tokens), "a row samples before its last token"
        sampled: list[int] = []
        for i, proposed in enumerate([*draft, None]):
            sampled.append(self._sample(seq_id, length - len(draft) + i))
            if sampled[-1] != proposed:
                break
        return sampled

    def _drafted(self, seq_id: int, count: int) -> list[int]:
        """Propose tokens as a good draft model would: about one token in four is wrong."""
        known = self._known[seq_id]
        tokens = list(known.tokens)
        for _ in range(count):
            right = self._sampled(known.start, self._visible(tokens))
            is_wrong = self._hash("draft", tokens) % 4 == 0
            tokens.append((right + is_wrong) % self.vocab_size)
        return tokens[len(tokens) - count :]

    def _sample(self, seq_id: int, length: int) -> int:
        return self._sampled(self._known[seq_id].start, self._seen(seq_id, length))

    def _sampled(self, start: SequenceStart, seen: list[int]) -> int:
        return (
            self._greedy(seen)
            if start.params.greedy
            else self._hash(start.seed, start.sample_index, seen)
        )

    def _visible(self, tokens: list[int]) -> list[int]:
        """Return what a correct cache has for these tokens."""
        seen: list[int] = []
        for group in self._groups:
            seen += tokens if group.window is None else tokens[-group.window :]
        return seen

    def _greedy(self, seen: list[int]) -> int:
        return self._hash(None, 0, seen)

    def _hash(self, *key: Any) -> int:
        return (
            int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
            % self.vocab_size
        )

    def _seen(self, seq_id: int, length: int) -> list[int]:
        """Return what the token after `length` tokens depends on: the tokens of all groups as read
        from the cache."""
        known, seen = self._known[seq_id], list[int]()
        for i, group in enumerate(self._groups):
            first = 0 if group.window is None else max(0, length - group.window)
            seen += [self._cache[i][self._slots(seq_id, p)[i][1]] for p in range(first, length)]
            assert seen[len(seen) - (length - first) :] == known.tokens[first:length], (
                "the cache has different tokens"
            )
        return seen

    def _add_logprobs(
        self, rows: list[tuple[int, int, int]], drafts: list[list[int]], result: StepResult
    ) -> None:
        for (seq_id, first, count), draft, sampled in zip(
            rows, drafts, result.token_ids, strict=True
        ):
            known, params = self._known[seq_id], self._known[seq_id].start.params
            ends = range(first + 1, min(first + count, known.start.num_prompt_tokens - 1) + 1)
            of_prompt, k = [], params.prompt_logprobs
            if k is not None:
                of_prompt = [
                    self._logprobs(self._seen(seq_id, end), known.tokens[end], k) for end in ends
                ]
            result.prompt_logprobs.append(of_prompt)
            asked, length = params.logprobs, first + count - len(draft)
            seen = (
                [self._seen(seq_id, length + i) for i in range(len(sampled))]
                if asked is not None
                else []
            )
            result.logprobs.append(
                [self._logprobs(s, t, asked or 0) for s, t in zip(seen, sampled, strict=bool(seen))]
            )

    def _logprobs(self, seen: list[int], token: int, k: int) -> TokenLogprobs:
        """Return a made-up distribution after `seen` whose most likely token is the greedy one."""
        rng = random.Random(repr(seen))
        logits = [rng.gauss(0, 1) for _ in range(self.vocab_size)]
        logits[self._greedy(seen)] = max(logits) + 1
        total = math.log(sum(map(math.exp, logits)))
        order = sorted(range(self.vocab_size), key=lambda t: -logits[t])
        ids = [token, *order[:k]]
        return TokenLogprobs(ids, [logits[t] - total for t in ids], order.index(token) + 1)

    def _misbehave(self) -> None:
        f = self._faults
        if f.step_seconds:
            self._clock.sleep(f.step_seconds)
        if f.raise_at == self.num_steps:
            raise StepFailed("simulated fault")
        if f.exit_at == self.num_steps:
            os._exit(3)
        if f.hang_at == self.num_steps:
            time.sleep(3600)
