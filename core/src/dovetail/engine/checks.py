"""Check what the loop relies on: plans, tokens and blocks. A plugin's mistake then fails its step,
with an error that says what is wrong.

Each class wraps a plugin's object and has the same interface; `build_engine` adds the wrappers, and
the loop knows nothing about them. They check a step as a whole (sums and counts, not row by row),
because they run in every step.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NoReturn

from dovetail.engine.block_pool import NULL_BLOCK
from dovetail.errors import PluginError
from dovetail.interfaces.clock import Clock
from dovetail.interfaces.drafter import Drafter
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.scheduler import Scheduler
from dovetail.interfaces.worker import Handle, Worker
from dovetail.sequence import Sequence
from dovetail.types import DRAFTED_BY_WORKER, StepPlan, StepResult

log = logging.getLogger(__name__)
Responsible = Callable[[BaseException, str], str]
"""(error, component that was called) -> provider responsible (`Attribution`)"""

PATIENCE = 10.0
"""Seconds for which a scheduler with sequences may schedule none while no step is in flight."""
_POLL_INTERVAL = 0.001
_computed = attrgetter("num_computed_tokens")


class CheckedScheduler:
    """A scheduler wrapper that checks its plans.

    If the scheduler fails, what it recorded about a step that will never run is undone, so that the
    requests of the step can be ended.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        responsible: Responsible,
        max_num_batched_tokens: int,
        clock: Clock,
    ) -> None:
        self._inner, self._name, self._responsible = scheduler, name, responsible
        self._max_num_batched_tokens, self._clock = max_num_batched_tokens, clock
        self.patience = PATIENCE
        self._sequences: dict[int, Sequence] = {}
        self._last: StepPlan | None = None
        self._ends = 0
        """Sum of the ends of the rows of the last plan; -1 if one of its sequences was removed."""
        self._idle_since: float | None = None

    waiting: Any = property(attrgetter("_inner.waiting"))
    running: Any = property(attrgetter("_inner.running"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def add(self, seq: Sequence) -> None:
        try:
            self._inner.add(seq)
        except Exception:
            with contextlib.suppress(Exception):  # the scheduler may or may not hold it
                self._inner.remove(seq)
            raise
        self._sequences[seq.seq_id] = seq

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence. Raises `PluginError` if the scheduler fails, because a scheduler that
        does not remove a sequence cannot be used any more."""
        if self._sequences.pop(seq.seq_id, None) is None:
            return  # `add` failed
        self._ends = -1
        try:
            self._inner.remove(seq)
        except Exception as e:
            who = self._responsible(e, "scheduler")
            raise PluginError(
                f"{who}: failed to remove a sequence: {type(e).__name__}: {e}",
                provider=self._name,
            ) from e

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        try:
            plan = self._inner.schedule(in_flight=in_flight)
            if plan is not None:
                self._check(plan)
                self._last, self._idle_since = plan, None
            elif not in_flight and self._sequences:
                self._wait()
            return plan
        except Exception:
            self._undo(self._last if in_flight else None)
            raise

    def _check(self, plan: StepPlan) -> None:
        if not isinstance(plan, StepPlan):
            self._fail(f"schedule returned {type(plan).__name__}, not a StepPlan")
        ids, num_tokens, num_computed = plan.seq_ids, plan.num_tokens, plan.num_computed
        last = self._last
        if (
            last is not None
            and ids == last.seq_ids
            and num_tokens == last.num_tokens
            and sum(num_computed) == self._ends
            and len(ids) == len(num_computed) == len(plan.samples) == len(plan.new_block_ids)
            and type(ends := self._ends + sum(num_tokens)) is int
        ):
            # The rows of the last plan, each advanced by its tokens: most plans are like this.
            self._ends = ends
            return
        if (
            not 0
            < len(ids)
            == len(num_tokens)
            == len(num_computed)
            == len(plan.samples)
            == len(plan.new_block_ids)
        ):
            self._fail("the plan's lists are empty or differ in length")
        try:
            sequences = [self._sequences[i] for i in ids]
            total, before = sum(num_tokens), sum(num_computed)
            after = sum(map(_computed, sequences))
            is_whole = (
                type(total) is type(before) is int
                and min(num_tokens) > 0
                and min(num_computed) >= 0
            )
        except (KeyError, TypeError) as e:
            self._fail(
                f"the plan contains an unknown sequence, or a count that is not an integer ({e})"
            )
        if len(set(ids)) != len(ids):
            self._fail("the plan has two rows for one sequence")
        if not is_whole or total > self._max_num_batched_tokens:
            self._fail(
                f"the plan has {total} tokens, or a row without tokens; the maximum is"
                f" {self._max_num_batched_tokens} tokens, the minimum one per row"
            )
        if before + total != after:
            self._fail("the plan's rows do not match the computed tokens of their sequences")
        self._ends = after

    def _wait(self) -> None:
        now = self._clock.now()
        self._idle_since = self._idle_since or now
        if now - self._idle_since > self.patience:
            self._idle_since = None
            self._fail(
                f"there are {len(self._sequences)} sequences, but none was scheduled for"
                f" {self.patience:g} s"
            )
        self._clock.sleep(_POLL_INTERVAL)

    def _undo(self, in_flight: StepPlan | None) -> None:
        """Reset what is in flight to what the worker received, whatever was planned since."""
        samples = (
            {}
            if in_flight is None
            else dict(zip(in_flight.seq_ids, in_flight.samples, strict=True))
        )
        for seq_id, seq in self._sequences.items():
            seq.steps_in_flight = int(seq_id in samples)
            seq.num_in_flight = int(samples.get(seq_id, False))

    def _fail(self, what: str) -> NoReturn:
        raise PluginError(what, provider=self._name)


class CheckedWorker:
    """A worker wrapper that checks that results have tokens exactly where the plan samples."""

    def __init__(self, worker: Worker, name: str, vocab_size: int) -> None:
        self._inner, self._name, self._vocab_size = worker, name, vocab_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def submit(self, plan: StepPlan) -> Handle:
        return plan, self._inner.submit(plan)

    def sample(self, handle: Handle, masks: dict[int, bytes] | None = None) -> StepResult:
        plan, inner = handle
        result = (
            self._inner.sample(inner, masks) if masks is not None else self._inner.sample(inner)
        )
        try:
            if (
                False not in plan.samples
                and len(result.token_ids) == len(plan.samples)
                and self._are_tokens(result.token_ids)
                and not (
                    result.failed
                    or result.logprobs
                    or result.prompt_logprobs
                    or plan.draft_token_ids
                )
            ):
                return result  # one token per row and nothing else: most steps
            problem = self._problem(plan, result)
        except Exception as e:
            problem = f"something that is not a StepResult ({type(e).__name__}: {e})"
        if problem:
            raise PluginError(f"the worker returned {problem}", provider=self._name)
        return result

    def _are_tokens(self, rows: list[list[int]]) -> bool:
        """Return whether each row is one token."""
        size = self._vocab_size
        for row in rows:
            if len(row) != 1 or type(row[0]) is not int or not 0 <= row[0] < size:
                return False
        return True

    def _problem(self, plan: StepPlan, result: StepResult) -> str:
        rows = result.token_ids
        drafts = plan.draft_token_ids or [[]] * len(rows)
        for seq_id, row, samples, draft in zip(
            plan.seq_ids, rows, plan.samples, drafts, strict=True
        ):
            expected = 0 if not samples or seq_id in result.failed else 1
            if not expected <= len(row) <= (samples and 1 + len(draft)):
                return f"{len(row)} tokens for a row that must have {expected}"
        if not self._are_tokens([[token] for row in rows for token in row]):
            return f"tokens that are not integers from 0 to {self._vocab_size - 1}"
        for name in ("logprobs", "prompt_logprobs"):
            if len(getattr(result, name)) not in (0, len(rows)):
                return f"{name} with {len(getattr(result, name))} rows; the plan has {len(rows)}"
        return ""


class CheckedKVCache:
    """A KV-cache manager wrapper that checks block ids. An exception in a method that returns
    nothing fails only the sequence concerned."""

    def __init__(self, kv: KVCacheManager, name: str) -> None:
        self._inner, self._name = kv, name
        self._sizes = list(kv.num_blocks)
        self.block_ids, self.free = kv.block_ids, kv.free
        self.faults, self.block_ops = kv.faults, kv.block_ops

    groups: Any = property(attrgetter("_inner.groups"))
    num_blocks: Any = property(attrgetter("_inner.num_blocks"))
    num_used: Any = property(attrgetter("_inner.num_used"))
    num_total: Any = property(attrgetter("_inner.num_total"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def grow(self, seq_id: int, num_tokens: int) -> list[list[int]] | None:
        added = self._inner.grow(seq_id, num_tokens)
        if added is None:
            return None
        try:
            for blocks, size in zip(added, self._sizes, strict=True):
                if blocks and not (
                    type(sum(blocks)) is int and min(blocks) > NULL_BLOCK and max(blocks) < size
                ):
                    break
            else:
                return added
        except (TypeError, ValueError):
            pass
        got = f"{str(added)[:100]}, which is not a list of block ids for each KV group"
        raise PluginError(f"grow returned {got}", provider=self._name)

    def share(self, source: int, target: int, num_tokens: int) -> int:
        return self._up_to(num_tokens, self._inner.share(source, target, num_tokens))

    def reuse(self, seq: Sequence, num_tokens: int, *, may_wait: bool = False) -> int | None:
        found = self._inner.reuse(seq, num_tokens, may_wait=may_wait)
        return None if found is None and may_wait else self._up_to(num_tokens, found)

    def _up_to(self, num_tokens: int, found: int | None) -> int:
        if type(found) is not int or not 0 <= found <= num_tokens:
            raise PluginError(
                f"the manager was asked for at most {num_tokens} tokens to share, and returned"
                f" {found!r}",
                provider=self._name,
            )
        return found

    def computed(self, seq: Sequence, num_tokens: int) -> None:
        try:
            self._inner.computed(seq, num_tokens)
        except Exception as e:
            self._note(seq.seq_id, e)

    def trim(self, seq_id: int, num_computed_tokens: int) -> None:
        try:
            self._inner.trim(seq_id, num_computed_tokens)
        except Exception as e:
            self._note(seq_id, e)

    def _note(self, seq_id: int, error: Exception) -> None:
        log.error("%s failed: %s: %s", self._name, type(error).__name__, error)
        if getattr(error, "provider", None) is None:
            error = PluginError(f"{type(error).__name__}: {error}", provider=self._name)
        self.faults.append((seq_id, error))


class CheckedDrafter:
    """A drafter wrapper that checks that proposals are token ids, and not more than requested."""

    def __init__(self, drafter: Drafter, vocab_size: int, *, runs_in_worker: bool = False) -> None:
        self._inner = drafter
        self._allowed = (
            range(DRAFTED_BY_WORKER, DRAFTED_BY_WORKER + 1) if runs_in_worker else range(vocab_size)
        )
        self.forget = drafter.forget

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        draft, allowed = self._inner.propose(seq, max_tokens), self._allowed
        if not isinstance(draft, list) or len(draft) > max_tokens:
            raise PluginError(
                f"the drafter was asked for a list of at most {max_tokens} tokens and returned"
                f" {draft!r}"
            )
        for token in draft:
            if type(token) is not int or token not in allowed:
                raise PluginError(
                    f"the drafter proposed {token!r}; token ids are integers from {allowed.start}"
                    f" to {allowed.stop - 1}"
                )
        return draft[:]
