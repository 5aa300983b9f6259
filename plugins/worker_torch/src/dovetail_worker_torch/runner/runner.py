"""One step on the device: inputs, forward pass through the attention extension point, logits of the
rows that need them, draw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import compress, pairwise, repeat
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dovetail.errors import PluginError
from dovetail.interfaces.architecture import Model
from dovetail.interfaces.attention import AttentionBackend, AttentionBatch, AttentionLayer
from dovetail.types import DRAFTED_BY_WORKER, KVGroup, StepPlan, StepResult, TokenLogprobs
from dovetail_worker_torch.runner.batch import I64, SequenceTable, StepInputs
from dovetail_worker_torch.runner.drafting import DraftRunner
from dovetail_worker_torch.runner.host_tier import HostTier
from dovetail_worker_torch.runner.shadow import ShadowAttention
from dovetail_worker_torch.runner.step_attention import StepAttention
from dovetail_worker_torch.sampling.backends import SamplerBackend
from dovetail_worker_torch.sampling.sampler import SamplingRows, sample, token_logprobs


@dataclass
class Computed:
    """A step whose forward pass is done and whose tokens are not sampled."""

    plan: StepPlan
    drafts: list[list[int]]
    """The plan's, with what the worker drafted itself."""
    inputs: StepInputs
    rows: list[int]
    """Of the plan: those that sample, in order; one with drafts stands here once for every token
    sampled."""
    behind: list[int]
    """Drafts of the row after the place that is sampled at, like `rows`; empty if no row has
    any."""
    is_plain: bool
    """Every row is sampled greedily from the raw logits, and nothing is asked about them."""
    logits: Tensor
    """f32[len(rows), V]"""
    prompt_logprobs: list[list[TokenLogprobs]]


class Runner:
    """Model, caches and sequence table of one device. Steps run in the order of the calls; not
    thread-safe.

    `forward` and `draw` are called in torch's inference mode.
    """

    def __init__(
        self,
        model: Model,
        groups: list[KVGroup],
        backends: list[AttentionBackend],
        caches: dict[int, object],
        table: SequenceTable,
        device: torch.device,
        sampler: SamplerBackend,
        provider_names: Mapping[str, str],
        shadow: ShadowAttention | None = None,
        drafting: DraftRunner | None = None,
    ) -> None:
        """`provider_names`: by key of the plan, the `dist:name` of those who take part in a
        step."""
        self._shadow, self._drafting = shadow, drafting
        self.host_tier: HostTier | None = None
        self.model = model
        self._provider_names = provider_names
        self.table = table
        self._sampler = sampler
        self.device = device
        self._is_cpu = device.type == "cpu"
        self._groups = groups
        self._backends = backends
        self._layers: list[list[AttentionLayer]] = [
            [model.attention_layers[i] for i in g.layers] for g in groups
        ]
        self._attend = StepAttention(
            model.attention_layers, groups, backends, caches, provider_names, shadow
        )

    def forward(self, plan: StepPlan) -> Computed:
        """Run the model over a step's tokens."""
        drafts = self.begin(plan)
        inputs = self.table.inputs(plan)
        if self._shadow is not None:
            self._shadow.begin_step(plan.step_id)
        for i, (group, backend) in enumerate(zip(self._groups, self._backends, strict=True)):
            batch = self._attention_batch(inputs, i)
            self._attend.plans[i] = backend.plan(batch, self._layers[i], group.block_size)
            if self._shadow is not None:
                self._shadow.plan(i, batch, self._layers[i])
        hidden = self.model.forward(
            self._token_ids(inputs), self._to_device(inputs.positions), self._attend
        )
        if hidden.ndim != 2 or len(hidden) != len(inputs.positions):
            self._refuse(
                f"forward gave hidden states {[*hidden.shape]} for {len(inputs.positions)} tokens"
            )
        is_plain = self.table.is_plain(inputs.batch_indices)
        prompt_logprobs = [] if is_plain else self._prompt_logprobs(plan, inputs, hidden)
        rows, behind = list(compress(range(len(plan.samples)), plan.samples)), list[int]()
        if drafts:
            places = [(r, left) for r in rows for left in range(len(drafts[r]), -1, -1)]
            rows, behind = [r for r, _ in places], [left for _, left in places]
        if len(rows) == len(hidden):
            logits = self._logits(hidden)
        else:
            at = inputs.query_start[1:][rows].astype(np.int64) - 1
            logits = self._logits(hidden[self._to_device(at - behind if behind else at)])
        return Computed(plan, drafts, inputs, rows, behind, is_plain, logits, prompt_logprobs)

    def begin(self, plan: StepPlan) -> list[list[int]]:
        """Take a plan in, and move the blocks that it moves; the sequence table is brought up to
        date before anything can fail. Returns the plan's drafts, with what the worker drafted
        itself."""
        self.table.update(plan)
        if plan.block_ops:
            if self.host_tier is None:
                raise ValueError("the plan moves blocks, and there is no host tier")
            self.host_tier.move(plan.block_ops)
        return self._drafts(plan)

    def _drafts(self, plan: StepPlan) -> list[list[int]]:
        """The plan's, none of them left to the worker."""
        if self._drafting is not None:
            self._drafting.update(plan)
            return self._drafting.draft(plan)
        if any(DRAFTED_BY_WORKER in draft for draft in plan.draft_token_ids):
            raise PluginError(
                "the plan leaves drafting to the worker, which was given no draft model"
            )
        return plan.draft_token_ids

    def _logits(self, hidden: Tensor) -> Tensor:
        """f32[R, V]: what comes after relies on it, some of it in C++."""
        logits: Tensor = self.model.logits(hidden)
        if logits.shape != (len(hidden), self.model.vocab_size) or logits.dtype != torch.float32:
            self._refuse(
                f"logits of {len(hidden)} rows are {[*logits.shape]} {logits.dtype}, not f32[R, V]"
            )
        return logits

    def _refuse(self, what: str) -> NoReturn:
        raise PluginError(f"the model's {what}", provider=self._provider_names.get("architecture"))

    def draw(self, step: Computed, masks: dict[int, bytes] | None = None) -> StepResult:
        """Draw the step's tokens and append them to the sequences."""
        plan, rows = step.plan, step.rows
        is_every_row = len(rows) == len(plan.seq_ids) and not step.behind
        # A row that samples has computed all its tokens, so its length is the number of them.
        batch_indices = (
            step.inputs.batch_indices if is_every_row else step.inputs.batch_indices[rows]
        )
        lengths = step.inputs.seq_lens if is_every_row else step.inputs.seq_lens[rows]
        if step.behind:
            lengths = lengths - np.array(step.behind, np.int32)
        result = StepResult(plan.step_id, [], prompt_logprobs=step.prompt_logprobs)
        if masks is None and step.is_plain and rows:
            sampled, usable = self._sampler.best(step.logits)
        elif rows:
            sampled, usable = self._draw_with_params(
                step, batch_indices, lengths.astype(np.int64), masks, result
            )
        else:
            sampled, usable = [], []
        # Where a draft was accepted this writes what stands there; past the first that was not,
        # nothing is ever read.
        self.table.append(batch_indices, lengths, sampled)
        if is_every_row and all(usable):
            result.token_ids = [[token] for token in sampled]
            return result
        result.token_ids = [[] for _ in plan.seq_ids]
        accepted = _accepted(step, sampled) if step.behind else repeat(True, len(rows))
        self.take(result, plan, compress(zip(rows, sampled, usable, strict=True), accepted))
        if step.behind and self._drafting is not None:
            self._drafting.verified(plan, result.token_ids)
        if step.behind and result.logprobs:
            result.logprobs = [
                of[: len(new)] for of, new in zip(result.logprobs, result.token_ids, strict=True)
            ]
        return result

    def take(
        self, result: StepResult, plan: StepPlan, sampled: Iterable[tuple[int, int, bool]]
    ) -> None:
        """Put what was sampled, (row, token, whether it is usable), into the result."""
        for row, token, is_usable in sampled:
            if is_usable:
                result.token_ids[row].append(token)
            else:
                computed = ", ".join(
                    dict.fromkeys(
                        f"{key.split('.')[0]} ({name})"
                        for key, name in self._provider_names.items()
                    )
                )
                result.failed[plan.seq_ids[row]] = (
                    f"the model's logits are not numbers (NaN); computed by {computed}"
                )

    def _draw_with_params(
        self,
        step: Computed,
        batch_indices: I64,
        lengths: I64,
        masks: dict[int, bytes] | None,
        result: StepResult,
    ) -> tuple[list[int], list[bool]]:
        """Draw as each row's parameters say; log-probabilities go into `result`."""
        plan = step.plan
        starts = [self.table.start_of[int(s)] for s in batch_indices]
        wanted = [i for i, s in enumerate(starts) if s.params.logprobs is not None]
        raw = step.logits[wanted] if wanted else None  # a copy: sampling overwrites
        row_masks = [masks.get(plan.seq_ids[r]) for r in step.rows] if masks else None
        tokens = self.table.token_ids[batch_indices, : int(lengths.max())]
        sampled, usable = sample(
            step.logits, SamplingRows(starts, tokens, lengths, row_masks), self._sampler
        )
        if raw is not None:
            result.logprobs = [[] for _ in plan.seq_ids]
            counts = [starts[i].params.logprobs or 0 for i in wanted]
            for i, logprobs in zip(
                wanted, token_logprobs(raw, [sampled[i] for i in wanted], counts), strict=True
            ):
                result.logprobs[step.rows[i]].append(logprobs)
        return sampled, usable

    def _attention_batch(self, inputs: StepInputs, group: int) -> AttentionBatch:
        starts, lens = inputs.host_query_start, inputs.host_seq_lens
        num_seqs, num_tokens = len(lens), starts[-1]
        return AttentionBatch(
            query_start=self._to_device(inputs.query_start),
            seq_lens=self._to_device(inputs.seq_lens),
            block_table=self._to_device(inputs.block_table[group]),
            slot_mapping=self._to_device(inputs.slot_mapping[group]),
            host_query_start=starts,
            host_seq_lens=lens,
            num_seqs=num_seqs,
            num_tokens=num_tokens,
            max_query_len=1 if num_tokens == num_seqs else max(b - a for a, b in pairwise(starts)),
            max_seq_len=max(lens),
        )

    def _prompt_logprobs(
        self, plan: StepPlan, inputs: StepInputs, hidden: Tensor
    ) -> list[list[TokenLogprobs]]:
        """For rows that asked: of the prompt tokens that follow the row's inputs."""
        out: list[list[TokenLogprobs]] = []
        for row, batch_index in enumerate(inputs.batch_indices.tolist()):
            start = self.table.start_of[batch_index]
            first = plan.num_computed[row] + 1
            end = min(first + plan.num_tokens[row], start.num_prompt_tokens)
            if start.params.prompt_logprobs is None or first >= end:
                continue
            out = out or [[] for _ in plan.seq_ids]
            begin = int(inputs.query_start[row])
            targets = self.table.token_ids[batch_index, first:end].tolist()
            # In pieces: the logits of a long prompt over a large vocabulary would not fit.
            for at in range(0, len(targets), 64):
                piece = targets[at : at + 64]
                logits = self._logits(hidden[begin + at : begin + at + len(piece)])
                out[row] += token_logprobs(
                    logits, piece, [start.params.prompt_logprobs] * len(piece)
                )
        return out

    def _token_ids(self, inputs: StepInputs) -> Tensor:
        return self._to_device(self.table.tokens_at(inputs))

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._is_cpu else tensor.to(self.device)


def _accepted(step: Computed, sampled: list[int]) -> Iterator[bool]:
    """Per draw: whether all drafts of its row before it were what was sampled, so that it
    counts."""
    good = True
    for i, (row, left) in enumerate(zip(step.rows, step.behind, strict=True)):
        draft = step.drafts[row]
        at = len(draft) - left
        good = at == 0 or (good and sampled[i - 1] == draft[at - 1])
        yield good
