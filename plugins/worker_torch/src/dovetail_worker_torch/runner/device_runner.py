"""A runner for devices that run behind the host: steps are queued, their tokens sampled there, and
looked at one step later.

What needs the host's word in between (drafts to verify, masks, penalties, log-probabilities, a
shadow run) waits for all that is queued, and then runs as `Runner` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import EngineDead, OutOfMemory
from dovetail.types import SamplingParams, StepPlan, StepResult
from dovetail_worker_torch.accelerator import Accelerator, Fetched
from dovetail_worker_torch.runner.batch import I64, StepInputs
from dovetail_worker_torch.runner.device_table import DeviceTable
from dovetail_worker_torch.runner.gpu_memory import graph_memory
from dovetail_worker_torch.runner.graphs import GraphLadder, capture_sizes
from dovetail_worker_torch.runner.runner import Computed, Runner
from dovetail_worker_torch.sampling.backends import best
from dovetail_worker_torch.sampling.sampler import SamplingRows, shape_logits


@dataclass(eq=False)
class InFlightStep:
    """A step whose tokens are sampled on the device; `result` once the host has looked at them."""

    plan: StepPlan
    rows: list[int]
    batch_indices: I64
    lengths: I64
    sampled: Fetched | None
    """i64[2, rows]: the tokens, and whether they are usable; None if no row samples."""
    result: StepResult | None = None


def waits_for_host(p: SamplingParams) -> bool:
    """What is asked needs the tokens before it on the host, or more of the logits than a token."""
    return p.penalized or p.logprobs is not None or p.prompt_logprobs is not None


class DeviceRunner(Runner):
    """Steps run in the order of the calls; not thread-safe. `submit` and `finalize` are called in
    torch's inference mode."""

    table: DeviceTable

    def __init__(self, *arguments: Any, accelerator: Accelerator) -> None:
        super().__init__(*arguments)
        self.accelerator = accelerator
        self.graphs: GraphLadder | None = None
        self._in_flight: list[InFlightStep] = []
        self._waiting: set[int] = set()
        """Sequences that wait for the host, by id."""

    def submit(self, plan: StepPlan) -> InFlightStep | Computed | StepResult:
        """Queue a step, or run it if it waits for the host. Raises `OutOfMemory` if the device has
        no room for it."""
        self._waiting.difference_update(plan.released)
        self._waiting.update(start.seq_id for start in plan.starts if waits_for_host(start.params))
        try:
            if (
                plan.masked
                or plan.draft_token_ids
                or self._shadow is not None
                or not self._waiting.isdisjoint(plan.seq_ids)
            ):
                for step in [*self._in_flight]:
                    self.finalize(step)
                computed = self.forward(plan)
                return computed if plan.masked else self.draw(computed)
            return self._queue(plan)
        except torch.AcceleratorError as e:
            raise self._lost(e) from e
        except torch.OutOfMemoryError as e:
            raise OutOfMemory(
                f"a step of {len(plan.seq_ids)} sequences and {sum(plan.num_tokens)} tokens found"
                f" no memory on {self.device}: lower scheduler.max_num_batched_tokens or"
                f" kv_cache.memory_fraction ({e})"
            ) from None

    def capture(self, max_num_seqs: int, progress: Callable[[int, int], None]) -> None:
        """Capture decode steps of up to so many sequences."""
        graphs = self._new_graphs(max_num_seqs)
        graphs.capture_all(progress)
        self.graphs = graphs

    def measure_capture(self, max_num_seqs: int) -> int:
        """Capture some sizes on trial; return the bytes that `capture` will take. The captured
        graphs are not kept."""
        return graph_memory(self.accelerator, lambda: self._new_graphs(max_num_seqs))

    def _new_graphs(self, max_num_seqs: int) -> GraphLadder:
        return GraphLadder(
            self.accelerator,
            self.model,
            self.table,
            self._groups,
            self._backends,
            self._layers,
            self._attend,
            capture_sizes(max_num_seqs),
        )

    def finalize(self, step: InFlightStep) -> StepResult:
        """Wait for a queued step's tokens."""
        if step.result is None:
            try:
                step.result = self._result_of(step)
            except torch.AcceleratorError as e:
                raise self._lost(e) from e
            self._in_flight.remove(step)
        return step.result

    def _lost(self, error: Exception) -> EngineDead:
        """What a kernel has done wrong shows at some later call, and all calls after it fail
        too."""
        return EngineDead(
            f"{self.device} failed, and nothing more can be run on it by this process: {error}"
        )

    def _result_of(self, step: InFlightStep) -> StepResult:
        result = StepResult(step.plan.step_id, [[] for _ in step.plan.seq_ids])
        if step.sampled is None:
            return result
        tokens, usable = step.sampled.wait().tolist()
        self.table.finalized(step.batch_indices, step.lengths, tokens)
        self.take(result, step.plan, zip(step.rows, tokens, usable, strict=True))
        return result

    def _queue(self, plan: StepPlan) -> InFlightStep:
        rows = list(compress(range(len(plan.samples)), plan.samples))
        is_decode = len(rows) == len(plan.seq_ids) == sum(plan.num_tokens)
        size = self.graphs.size_for(len(rows)) if is_decode and self.graphs is not None else None
        if size is None or self.graphs is None:
            step = self.forward(plan)
            batch_indices, lengths = (
                step.inputs.batch_indices[rows],
                step.inputs.seq_lens[rows].astype(np.int64),
            )
            logits, is_plain = step.logits, step.is_plain
        else:
            self.begin(plan)
            batch_indices, num_computed = (
                self.table.batch_indices(plan),
                np.array(plan.num_computed, np.int64),
            )
            logits, is_plain = (
                self.graphs.run(batch_indices, num_computed, size),
                self.table.is_plain(batch_indices),
            )
            lengths = num_computed + 1
        queued = InFlightStep(
            plan,
            rows,
            batch_indices,
            lengths,
            self._sampled(logits, batch_indices, lengths, is_plain) if rows else None,
        )
        self._in_flight.append(queued)
        return queued

    def _sampled(self, logits: Tensor, batch_indices: I64, lengths: I64, is_plain: bool) -> Fetched:
        if not is_plain:
            starts = [self.table.start_of[batch_index] for batch_index in batch_indices.tolist()]
            nobody = np.zeros((len(batch_indices), 0), np.int32)
            shape_logits(logits, SamplingRows(starts, nobody, lengths), self._sampler)
        tokens, usable = best(logits)
        self.table.append_on_device(batch_indices, lengths, tokens)
        return self.accelerator.fetch(torch.stack([tokens, usable.to(tokens.dtype)]))

    def _to_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        return self.accelerator.upload(array)

    def _token_ids(self, inputs: StepInputs) -> Tensor:
        """From the device's own table: the host may not know the last ones yet."""
        return self.table.device_tokens_at(inputs)
