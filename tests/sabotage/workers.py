"""Mistakes that workers make, over torch's."""

from __future__ import annotations

import os

import msgspec
import torch

from dovetail.errors import CheckpointError
from dovetail.types import StepResult
from dovetail_worker_torch import dovetail_workers
from dovetail_worker_torch.sampling.backends import TorchSampler
from dovetail_worker_torch.worker import TorchWorker
from sabotage import Sabotages

(TORCH,) = dovetail_workers()
DRAFTS = "test_drafts_change_no_output"
SABOTAGES = Sabotages("worker", TORCH, {"execution": "plain"})
GREEDY, BATCH, SEEDS, PREEMPTED, PARAMETERS = (
    "test_greedy_is_the_references",
    "test_a_batch_is_each_alone",
    "test_seeds",
    "test_preemption_changes_nothing",
    "test_sampling_parameters",
)
sabotage = SABOTAGES.of_class(lambda cls, context, options: cls(context, options))


class Meddling(TorchWorker):
    """Gets hold of a plan's starts on the way in, and of a result on the way out. `lives` once it
    is warmed up."""

    lives = False

    def warm_up(self, progress):
        super().warm_up(progress)
        self.lives = True

    def submit(self, plan):
        if not self.lives:
            return super().submit(plan)
        starts = [self.start(s, plan) for s in plan.starts]
        return super().submit(msgspec.structs.replace(plan, starts=starts))

    def start(self, start, plan):
        return start

    def sample(self, handle, masks=None):
        result = super().sample(handle, masks)
        return self.result(result) if self.lives else result

    def result(self, result):
        return result


def changed(start, **changes):
    return msgspec.structs.replace(start, **changes)


def with_params(start, **changes):
    return changed(start, params=msgspec.structs.replace(start.params, **changes))


@sabotage(BATCH)
class NoiseOfTheRow(Meddling):
    """A row's noise is keyed by its place in the batch."""

    def start(self, start, plan):
        return changed(start, seed=start.seed + plan.seq_ids.index(start.seq_id))


@sabotage(SEEDS)
class SampleIndexIgnored(Meddling):
    """The samples of a request share their noise."""

    def start(self, start, plan):
        return changed(start, sample_index=0)


@sabotage(SEEDS)
class SeedIgnored(Meddling):
    """Noise is keyed by the request, not by its seed."""

    def start(self, start, plan):
        return changed(start, seed=start.seq_id)


class Biased(TorchSampler):
    """Adds to the likeliest token's logit what moves a probability of 0.50 to 0.51."""

    def add_gumbel_noise_(self, logits, keys):
        logits[torch.arange(len(logits)), logits.argmax(-1)] += 0.04001
        super().add_gumbel_noise_(logits, keys)


@sabotage("test_draws_follow_the_distribution")
class BiasedByOnePercent(Meddling):
    """The likeliest token, of probability 1/2, is sampled a percentage point too often."""

    def warm_up(self, progress):
        super().warm_up(progress)
        self._runner._sampler = Biased()


@sabotage(PREEMPTED)
class StaleAfterPreemption(Meddling):
    """Of a sequence that starts again, the last token is the one that it had when it began."""

    def start(self, start, plan):
        output = start.token_ids[start.num_prompt_tokens :]
        return changed(start, token_ids=[*start.token_ids[:-1], output[0]]) if output else start


@sabotage(PREEMPTED)
class OutputTakenForPrompt(Meddling):
    """A sequence that starts again samples with the noise of its first positions."""

    def start(self, start, plan):
        return changed(start, seed=start.seed + len(start.token_ids) - start.num_prompt_tokens)


@sabotage("test_a_bad_step_is_an_error_and_no_more")
class ExceptionSwallowed(Meddling):
    """A step that raises is answered with token 0."""

    def submit(self, plan):
        try:
            return super().submit(plan)
        except Exception:
            return StepResult(plan.step_id, [[0] if samples else [] for samples in plan.samples])


@sabotage("test_nan_is_no_token")
class NanIsAToken(Meddling):
    """A row whose logits are NaN is answered with token 0."""

    def result(self, result):
        return msgspec.structs.replace(
            result, token_ids=[ids or [0] for ids in result.token_ids], failed={}
        )


@sabotage("test_chunks_are_the_whole")
class ChunksBeginAtZero(Meddling):
    """The positions of every chunk begin at 0."""

    def warm_up(self, progress):
        super().warm_up(progress)
        forward, model = self._runner.model.forward, self._runner.model

        def from_zero(token_ids, positions, attention):
            one_chunk = len(positions) > 1 and bool((positions.diff() == 1).all())
            return forward(
                token_ids, positions - positions[0] if one_chunk else positions, attention
            )

        model.forward = from_zero


@sabotage(PARAMETERS)
class TopKIgnored(Meddling):
    """top_k is not looked at."""

    def start(self, start, plan):
        return with_params(start, top_k=0)


@sabotage(PARAMETERS)
class MinTokensIgnored(Meddling):
    """A sequence may end before min_tokens."""

    def start(self, start, plan):
        return with_params(start, min_tokens=0)


@sabotage(PARAMETERS)
class MaskIgnored(Meddling):
    """Masks are not applied."""

    def sample(self, handle, masks=None):
        return super().sample(handle)


@sabotage("test_logprobs_are_the_references")
class LogprobsAfterTemperature(Meddling):
    """Log-probabilities are those of the distribution that was sampled from."""

    def result(self, result):
        for entry in (e for row in result.logprobs for e in row):
            entry.logprobs = [x / 0.7 for x in entry.logprobs]
        return result


@sabotage("test_logprobs_are_the_references")
class RankFromZero(Meddling):
    """The likeliest token has rank 0."""

    def result(self, result):
        for entry in (
            e for rows in (result.logprobs, result.prompt_logprobs) for row in rows for e in row
        ):
            entry.rank -= 1
        return result


@sabotage(GREEDY)
class SecondBest(Meddling):
    """Greedy rows are sampled at a low temperature."""

    def start(self, start, plan):
        return with_params(start, temperature=1.0) if start.params.greedy else start


@sabotage("test_steps_in_flight")
class InputFromThePlan(Meddling):
    """In flight the next input is token 0, for the plan does not say what it will be."""

    in_flight = 0

    def submit(self, plan):
        self.in_flight += 1
        if self.lives and self.in_flight > 1 and not plan.starts and self._thread is not None:
            table = self._runner.table
            inputs = table.inputs

            def unknown(plan):
                table.inputs = inputs
                found = inputs(plan)
                found.token_ids[:] = 0
                return found

            table.inputs = unknown
        return super().submit(plan)

    def sample(self, handle, masks=None):
        self.in_flight -= 1
        return super().sample(handle, masks)


@sabotage("test_a_damaged_checkpoint_is_named")
class CheckpointErrorWrapped(Meddling):
    """What is wrong with a checkpoint is told as an error of another kind, without its name."""

    def load(self, progress):
        try:
            super().load(progress)
        except CheckpointError:
            raise RuntimeError("loading failed") from None


@sabotage("test_life")
class HalfTheBytes(Meddling):
    """A block's bytes are counted for the keys alone."""

    def kv_groups(self):
        return [
            msgspec.structs.replace(g, bytes_per_block=g.bytes_per_block // 2)
            for g in super().kv_groups()
        ]


def settle_by_time(context, options):
    """Decides an option by what differs from call to call."""
    settled, remarks = TORCH.resolve_options(context, options)
    return (
        settled.model_copy(update={"num_threads": 1 + len(remarks_so_far)}),
        remarks_so_far.append(os.getpid()) or remarks,
    )


remarks_so_far: list[int] = []


@sabotage("test_the_plan_travels", resolve_options=settle_by_time)
class PlanOfTheMoment(Meddling):
    """An option is decided by the process that happens to ask."""


class Verifying(Meddling):
    """Gets hold of the steps with drafts."""

    def warm_up(self, progress):
        super().warm_up(progress)
        self.plans = {}
        self.hook(self._runner)

    def hook(self, runner):
        pass

    def submit(self, plan):
        if self.lives:
            self.plans[plan.step_id] = plan
        return super().submit(plan)

    def result(self, result):
        plan = self.plans.pop(result.step_id)
        for row, draft in enumerate(plan.draft_token_ids):
            if draft:
                self.row(result, row, draft)
        return result

    def row(self, result, row, draft):
        pass


@sabotage(DRAFTS)
class AcceptsOneTooMany(Verifying):
    """The first draft that is not what was sampled is accepted."""

    def row(self, result, row, draft):
        accepted = len(result.token_ids[row]) - 1
        if accepted < len(draft):
            result.token_ids[row][accepted:] = [draft[accepted], result.token_ids[row][accepted]]


@sabotage(DRAFTS)
class AcceptsNone(Verifying):
    """Drafts are computed, and none is accepted."""

    def row(self, result, row, draft):
        del result.token_ids[row][1:]


@sabotage(DRAFTS)
class RejectedDraftStays(Verifying):
    """Where a draft was rejected it stays in the sequence's table, and is the next step's input."""

    def hook(self, runner):
        append = runner.table.append

        def last_only(batch_indices, lengths, token_ids):
            last = {int(batch_index): i for i, batch_index in enumerate(batch_indices)}
            append(
                batch_indices[list(last.values())],
                lengths[list(last.values())],
                [token_ids[i] for i in last.values()],
            )

        runner.table.append = last_only


@sabotage(DRAFTS, "test_logprobs_with_drafts")
class LastLogitsForAll(Verifying):
    """All places of a row are verified with the logits of its last."""

    def hook(self, runner):
        forward = runner.forward

        def last(plan):
            step = forward(plan)
            for i in range(len(step.behind) - 1, 0, -1):
                if step.behind[i - 1]:
                    step.logits[i - 1] = step.logits[i]
            return step

        runner.forward = last


@sabotage(DRAFTS)
class NoiseOfTheLastPlace(Verifying):
    """All places of a row are sampled with the noise of its last."""

    def hook(self, runner):
        draw = runner._draw_with_params

        def last(step, batch_indices, lengths, masks, result):
            if step.behind:
                lengths = lengths + step.behind
            return draw(step, batch_indices, lengths, masks, result)

        runner._draw_with_params = last


@sabotage(DRAFTS)
class PenaltiesWithoutDrafts(Verifying):
    """Penalties do not count the drafts that stand before a place."""

    def hook(self, runner):
        draw, table = runner._draw_with_params, runner.table

        def without(step, batch_indices, lengths, masks, result):
            kept = table.token_ids.copy()
            for batch_index, length, left in zip(
                batch_indices, lengths, step.behind, strict=bool(step.behind)
            ):
                table.token_ids[batch_index, length : length + left] = 0
            sampled = draw(step, batch_indices, lengths, masks, result)
            table.token_ids[:] = kept
            return sampled

        runner._draw_with_params = without


@sabotage("test_logprobs_with_drafts")
class LogprobsOfTheRejected(Verifying):
    """A draft that was not accepted has an entry among the log-probabilities."""

    def row(self, result, row, draft):
        if result.logprobs and result.logprobs[row] and len(result.token_ids[row]) <= len(draft):
            result.logprobs[row].append(result.logprobs[row][-1])
