"""Implement the engine loop: schedule, execute, commit.

`Engine` is the plain loop and the one to read. `OverlappedEngine` schedules and submits a step
while the previous one runs, with the same outputs. Both hold plain objects only: they call no
plugin hook and know nothing about tensors, text or processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dovetail.engine.decode import commit_decode_rows
from dovetail.engine.speculation import Speculation
from dovetail.errors import DovetailError, EngineDead, Overloaded, StepFailed
from dovetail.interfaces.clock import Clock
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.scheduler import Scheduler
from dovetail.interfaces.worker import Handle, Worker
from dovetail.sequence import Sequence
from dovetail.types import (
    EngineStats,
    FinishReason,
    Request,
    RequestTimes,
    SequenceOutput,
    StepPlan,
    StepResult,
)

MAX_FAILED_STEPS = 20
"""Number of consecutive failed steps after which the engine gives up, because an engine that fails
every step only appears to be alive."""


@dataclass
class Step:
    """A step in flight."""

    plan: StepPlan
    handle: Handle


class Engine:
    """The plain loop: one step at a time, nothing in flight between calls."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv: KVCacheManager,
        worker: Worker,
        speculation: Speculation | None = None,
        *,
        clock: Clock,
        max_num_waiting: int,
        responsible: Callable[[BaseException, str], str] = lambda error, part: part,
        seq_ids: Iterator[int] | None = None,
    ) -> None:
        """Create an engine.

        Args:
            responsible: returns the provider responsible for an error, given the error and the
                component that was called.
            seq_ids: numbers that count up, for sequences; by default from 0.
        """
        self.scheduler = scheduler
        self.kv = kv
        self.worker = worker
        self.speculation = speculation
        self.clock = clock
        self.max_num_waiting = max_num_waiting
        self.responsible = responsible
        self.stats = EngineStats(kv_blocks_total=kv.num_total)
        self.sequences: dict[int, Sequence] = {}
        self.requests: dict[str, list[Sequence]] = {}
        self.num_scheduled_tokens = 0
        """Number of tokens in the last step that was submitted."""
        self._num_failed_in_row = 0
        self._seq_ids = itertools.count() if seq_ids is None else seq_ids
        self._outputs: list[SequenceOutput] = []
        self._has_windows = any(g.window is not None for g in kv.groups)
        self._block_size = math.gcd(*(g.block_size for g in kv.groups))

    def add(self, request: Request) -> None:
        """Queue a request. Raises `Overloaded`, and queues nothing, if the waiting queue is
        full."""
        if len(self.scheduler.waiting) + request.params.n > self.max_num_waiting:
            raise Overloaded(
                f"{len(self.scheduler.waiting)} sequences are waiting (max_num_waiting"
                f" {self.max_num_waiting})"
            )
        if request.request_id in self.requests:
            raise DovetailError(f"request id {request.request_id!r} is already in use")
        group: list[Sequence] = []
        for index in range(request.params.n):
            seq_id, tokens = next(self._seq_ids), list(request.prompt_token_ids)
            seq = Sequence(seq_id, request, index, tokens, group, added_at=self.clock.now())
            group.append(seq)
            self.sequences[seq.seq_id] = seq
        self.requests[request.request_id] = group
        try:
            for seq in group:
                self.scheduler.add(seq)
        except Exception as e:
            self._fail([group[0].seq_id], e, "scheduler")

    def abort(self, request_id: str, sample_index: int | None = None) -> None:
        """End a request, or one of its samples, now. Unknown and finished requests are ignored: a
        request may finish before its abort arrives."""
        for seq in list(self.requests.get(request_id, ())):
            if sample_index in (None, seq.sample_index):
                self._finish(seq, "abort")

    def fail(self, request_id: str, code: str, message: str) -> None:
        """End a request with an error; `code` is one of errors.py. Unknown requests are ignored."""
        for seq in list(self.requests.get(request_id, ())):
            if seq.finish_reason is None:
                output = SequenceOutput(request_id, seq.sample_index, [], error=(code, message))
                self._outputs.append(output)
                self._finish(seq, "error", output)

    @property
    def has_work(self) -> bool:
        return bool(self.sequences or self._outputs)

    def step(self) -> list[SequenceOutput]:
        """Run one step and return the outputs of every sequence that has any. Raises `EngineDead`
        if the worker has lost its device."""
        plan = self.schedule(in_flight=False)
        if plan is not None:
            step = self.submit(plan)
            if step is not None:
                self.finish_step(step)
        return self.take_outputs()

    # The parts of a step; the overlapped loop uses them in another order.

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        if self.speculation is not None:
            for seq_id, error in self.speculation.draft(
                self.scheduler.running, in_flight=in_flight
            ):
                self._fail([seq_id], error, "speculation")
            if in_flight and self.speculation.waits:
                return None
        try:
            plan = self.scheduler.schedule(in_flight=in_flight)
            if plan is not None and self.kv.block_ops:
                plan.block_ops, self.kv.block_ops[:] = self.kv.block_ops.copy(), ()
            return plan
        except Exception as e:
            self._fail(
                [s.seq_id for s in self.scheduler.running] or list(self.sequences), e, "scheduler"
            )
            return None
        finally:
            self._fail_faulty()

    def submit(self, plan: StepPlan) -> Step | None:
        """Submit a plan to the worker. If the worker raises an exception, fail the requests of the
        step and return None."""
        self.stats.num_steps += 1
        self.num_scheduled_tokens = sum(plan.num_tokens)
        for start in plan.starts:
            seq = self.sequences[start.seq_id]
            seq.started_at = seq.started_at or self.clock.now()
        try:
            return Step(plan, self.worker.submit(plan))
        except EngineDead:
            raise
        except BaseException as e:
            self._end_failed_step(plan, e)
            if not isinstance(e, Exception):
                # An interrupt: the requests of the step have failed, and the engine continues.
                raise
            return None

    def finish_step(self, step: Step) -> None:
        """Wait for the tokens of a step and commit them."""
        try:
            result = self.worker.sample(step.handle)
        except EngineDead:
            raise
        except BaseException as e:
            self._end_failed_step(step.plan, e)
            if not isinstance(e, Exception):
                raise
            return
        self.commit(step.plan, result)

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Apply the results of a step: append tokens, finish sequences, free blocks behind a
        sliding window."""
        self._num_failed_in_row = 0
        num_rows, outputs = len(plan.seq_ids), self._outputs
        if (
            result.failed
            or result.logprobs
            or result.prompt_logprobs
            or plan.draft_token_ids
            or self._has_windows
        ):
            for row in range(num_rows):
                self._commit_row(plan, row, result)
        else:
            rows = enumerate(zip(plan.seq_ids, plan.num_computed, result.token_ids, strict=True))
            size, sequences = self._block_size, self.sequences
            self.stats.num_generation_tokens += num_rows
            while (at := commit_decode_rows(rows, sequences, outputs, size)) is not None:
                self.stats.num_generation_tokens -= 1  # counted by `_commit_row`
                self._commit_row(plan, at, result)
        self._fail_faulty()

    def _commit_row(self, plan: StepPlan, row: int, result: StepResult) -> None:
        seq = self._finalize_row(plan, row)
        if seq.finish_reason is not None:
            return  # the sequence ended while this step was in flight: its token is surplus
        if seq.seq_id in result.failed:
            self._fail([seq.seq_id], StepFailed(result.failed[seq.seq_id]), "worker")
            return
        new = result.token_ids[row]
        num_computed = plan.num_computed[row] + plan.num_tokens[row]
        num_drafted = len(plan.draft_token_ids[row]) if plan.draft_token_ids else 0
        if num_drafted:
            # KV computed for rejected draft tokens is invalid and will be computed again.
            num_computed = seq.num_computed_tokens = num_computed - num_drafted + len(new) - 1
        if self.speculation is not None and new:
            self.speculation.verified(seq, num_drafted, len(new) - 1)
        self._count_prompt(plan, row, seq)
        output = SequenceOutput(
            seq.request.request_id,
            seq.sample_index,
            new,
            result.logprobs[row] if result.logprobs else [],
        )
        output.num_cached_tokens = seq.num_cached_tokens
        if new and seq.num_output_tokens == 0:
            output.times = RequestTimes(
                seq.started_at - seq.added_at, self.clock.now() - seq.started_at
            )
        if result.prompt_logprobs:
            output.prompt_logprobs = result.prompt_logprobs[row][
                max(0, seq.num_prompt_logprobs - plan.num_computed[row]) :
            ]
            seq.num_prompt_logprobs += len(output.prompt_logprobs)
        seq.tokens.extend(new)
        reason = self._end_reason(seq, output, num_computed)
        self.stats.num_generation_tokens += len(
            output.token_ids
        )  # without tokens after a stop token
        if output.token_ids or output.prompt_logprobs or reason:
            self._outputs.append(output)
        if reason is not None:
            self._finish(seq, reason, output)
        else:
            self.kv.computed(seq, num_computed)
            self.kv.trim(seq.seq_id, num_computed)

    def _finalize_row(self, plan: StepPlan, row: int) -> Sequence:
        """Record that a row is no longer in flight. Release its sequence if it has ended
        meanwhile."""
        seq = self.sequences[plan.seq_ids[row]]
        seq.steps_in_flight -= 1
        seq.num_in_flight -= plan.samples[row]
        if seq.finish_reason is not None:
            self._release(seq)
        return seq

    def take_outputs(self) -> list[SequenceOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def snapshot(self) -> EngineStats:
        """Return the stats with current gauges."""
        s, scheduler = self.stats, self.scheduler
        s.num_requests_running = len(scheduler.running)
        s.num_requests_waiting = len(scheduler.waiting)
        s.num_preemptions = scheduler.num_preemptions
        s.kv_blocks_used = self.kv.num_used
        self.kv.count(s)
        if self.speculation is not None:
            self.speculation.count(s)
        return s

    # How sequences end.

    def _end_reason(
        self, seq: Sequence, output: SequenceOutput, num_computed: int
    ) -> FinishReason | None:
        """Return why the sequence ends now, if it does: stop token ids or length. The front-end
        finds stop strings and then aborts. `num_computed` excludes steps in flight, so that a
        prompt that is only scored ends when its last chunk has been committed."""
        r = seq.request
        first = len(seq.tokens) - len(output.token_ids)
        for i, token in enumerate(output.token_ids):
            num_output = first + i + 1 - seq.num_prompt_tokens
            if num_output < r.params.min_tokens:
                continue
            is_stop = token in r.params.stop_token_ids
            if is_stop or token in r.eos_token_ids:
                output.stop_token_id = token if is_stop else None
                self._truncate(seq, output, i + 1)
                return "stop"
            if num_output >= r.max_tokens:
                self._truncate(seq, output, i + 1)
                return "length"
        return "length" if r.max_tokens == 0 and num_computed >= seq.num_prompt_tokens else None

    @staticmethod
    def _truncate(seq: Sequence, output: SequenceOutput, count: int) -> None:
        surplus = len(output.token_ids) - count
        if surplus:
            del seq.tokens[-surplus:]
            output.token_ids = output.token_ids[:count]
            output.logprobs = output.logprobs[:count]

    def _finish(
        self, seq: Sequence, reason: FinishReason, output: SequenceOutput | None = None
    ) -> None:
        if seq.finish_reason is not None:
            return
        if output is None:
            output = SequenceOutput(seq.request.request_id, seq.sample_index, [])
            self._outputs.append(output)
        output.finish_reason = reason
        seq.finish_reason = reason
        self._release(seq)

    def _release(self, seq: Sequence) -> None:
        """Remove a finished sequence, once no step in flight contains it."""
        if seq.steps_in_flight:
            return
        if seq.finish_reason != "error":
            self.kv.computed(seq, min(seq.num_computed_tokens, len(seq.tokens)))
        if self.speculation is not None:
            self.speculation.forget(seq.seq_id)
        del self.sequences[seq.seq_id]
        seq.siblings.remove(seq)
        if not seq.siblings:
            self.requests.pop(seq.request.request_id, None)
        self.scheduler.remove(seq)

    # How sequences fail.

    def _end_failed_step(self, plan: StepPlan, error: BaseException) -> None:
        self.stats.num_failed_steps += 1
        for row in range(len(plan.seq_ids)):
            self.sequences[plan.seq_ids[row]].num_computed_tokens = plan.num_computed[row]
            self._finalize_row(plan, row)
        seq_ids = plan.seq_ids
        # The moves may not have been executed, and other sequences may have found the blocks.
        if plan.block_ops:
            self.kv.reset_prefix_cache()
            seq_ids = [*seq_ids, *(s.seq_id for s in self.scheduler.running)]
        self._fail(seq_ids, error, "worker")
        self._num_failed_in_row += 1
        if self._num_failed_in_row >= MAX_FAILED_STEPS:
            self._num_failed_in_row = 0
            raise EngineDead(
                f"{MAX_FAILED_STEPS} steps in a row have failed; the last: {error}"
            ) from error

    def _fail_faulty(self) -> None:
        """Fail the requests that the KV-cache manager reported as faulty."""
        while self.kv.faults:
            seq_id, error = self.kv.faults.pop()
            self._fail([seq_id], error, "prefix_cache")

    def _fail(self, seq_ids: list[int], error: BaseException, part: str) -> None:
        """Fail whole requests: samples of one request may share blocks that were never written."""
        code = error.code if isinstance(error, DovetailError) else StepFailed.code
        message = f"{self.responsible(error, part)}: {type(error).__name__}: {error}"
        for request_id in dict.fromkeys(
            self.sequences[i].request.request_id for i in seq_ids if i in self.sequences
        ):
            self.fail(request_id, code, message)

    def _count_prompt(self, plan: StepPlan, row: int, seq: Sequence) -> None:
        if seq.num_output_tokens == 0 and seq.sample_index == 0:  # count a prompt once per request
            done = min(plan.num_computed[row] + plan.num_tokens[row], seq.num_prompt_tokens)
            self.stats.num_prompt_tokens += max(0, done - seq.num_prompt_counted)
            seq.num_prompt_counted = max(done, seq.num_prompt_counted)


class OverlappedEngine(Engine):
    """The overlapped loop: while step n runs, step n + 1 is scheduled and submitted; then step n is
    committed.

    Step n + 1 is planned before the tokens of step n are known. It may therefore compute a token
    for a sequence that step n ends; that token is dropped. No sequence is preempted while a step is
    in flight.
    """

    _in_flight: Step | None = None

    @property
    def has_work(self) -> bool:
        return super().has_work or self._in_flight is not None

    def step(self) -> list[SequenceOutput]:
        previous, self._in_flight = self._in_flight, None
        try:
            plan = self.schedule(in_flight=previous is not None)
            if plan is not None:
                self._in_flight = self.submit(plan)
        except BaseException:
            self._in_flight = previous  # the next step finishes it
            raise
        if previous is not None:
            self.finish_step(previous)
        return self.take_outputs()
