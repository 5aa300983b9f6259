"""Provide the checks of the worker contract that concern draft tokens: verifying many of them at a
time does not change outputs."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from dovetail.interfaces.worker import WorkerCapabilities
from dovetail.types import DRAFTED_BY_WORKER, TokenLogprobs
from dovetail_testing.contract import common_causes
from dovetail_testing.worker_driver import EOS, Driver, SequenceState
from dovetail_testing.worker_trial import Asked, WorkerTrial

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5, "frequency_penalty": 0.9},
    {"min_p": 0.05},
    {"top_k": 9},
    {"top_p": 0.8},
    {"logit_bias": {5: 3.0, 6: 3.0, 7: -5.0}},
    {"min_tokens": 6, "logit_bias": {EOS: 12.0}},
)
NUM_TOKENS = 12


class DraftChecks(WorkerTrial):
    """Checks of draft tokens, mixed into `WorkerContract`."""

    extension_point = "worker"

    @pytest.mark.parametrize("share_right", [1.0, 0.0, 0.7], ids=["right", "wrong", "mixed"])
    @common_causes(
        "a position is verified with the logits, noise or penalties of another one",
        "accepted draft tokens are left out of the penalties",
        "a rejected draft token remains where the next step reads its input",
        "one draft token too many or too few is accepted",
    )
    def test_drafts_change_no_output(self, share_right: float) -> None:
        """With draft tokens, right or wrong, more in some rows of a step and fewer or none in
        others, each sequence has the same output as without. A draft token is accepted while it
        equals the sampled token, for greedy and sampled decoding, with every parameter."""
        asked = [
            replace(self.some(length, temperature=temperature, seed=length), more=more)
            for i, more in enumerate(SETTINGS)
            for length, temperature in ((3 + i, 0.0), (20 + 2 * i, 0.9))
        ]
        rng = random.Random(self.seed)

        def drafted(driver: Driver, ids: list[int], expected: list[list[int]]) -> list[list[int]]:
            coming = dict(zip(ids, expected, strict=True))
            return driver.generate_with_drafts(
                ids, NUM_TOKENS, self.guesses(rng, coming, share_right)
            )

        self.same_both_ways(drafted, f"with {share_right:.0%} of the draft tokens right", asked)

    @common_causes(
        "draft tokens of a past step are treated as tokens of the sequence",
        "a table is longer than the known tokens",
    )
    def test_drafts_and_preemption(self) -> None:
        """A sequence that is released after a step with draft tokens and started again, without and
        with draft tokens, continues as before."""
        rng = random.Random(self.seed)

        def preempted(driver: Driver, ids: list[int], expected: list[list[int]]) -> list[list[int]]:
            guesses = self.guesses(rng, dict(zip(ids, expected, strict=True)), 0.7)
            driver.generate_with_drafts(ids, 5, guesses)
            for i in reversed(ids[::2]):
                driver.release(i)
            driver.generate(ids[1::2], 7)
            return driver.generate_with_drafts(ids, NUM_TOKENS, guesses)

        asked = [self.some(n, temperature=t, seed=n) for n in (3, 20, 37) for t in (0.0, 0.9)]
        self.same_both_ways(preempted, "with draft tokens and preemption", asked)

    @common_causes(
        "rejected draft tokens have entries",
        "the logits of a row's last position are used for all of its positions",
    )
    def test_logprobs_with_drafts(self) -> None:
        """Every token has one entry, and there are no others; the entries equal those without draft
        tokens within 1e-3."""
        rng = random.Random(self.seed)
        for temperature in (0.0, 0.8):
            asked = replace(
                self.some(9, temperature=temperature, seed=3),
                more={"logprobs": 3, "prompt_logprobs": 1},
            )
            plain = self.new_sequence(asked)
            expected = self.driver.generate([plain], NUM_TOKENS)
            drafted = self.new_sequence(asked)
            beside = self.new_sequence(self.some(5))
            coming = {drafted: expected[0], beside: self.alone([self.some(5)])[0]}
            self.driver.generate_with_drafts(
                [beside, drafted], NUM_TOKENS, self.guesses(rng, coming, 0.7)
            )
            states = [self.driver.sequences[i] for i in (plain, drafted)]
            self.driver.end([plain, drafted, beside])
            want, got = (entries(s) for s in states)
            assert states[0].output == states[1].output, (
                f"with draft tokens the output is {states[1].output}, but without it is"
                f" {states[0].output}"
            )
            assert len(got) == len(want), f"{len(want)} tokens, but {len(got)} entries"
            for i, (w, g) in enumerate(zip(want, got, strict=True)):
                assert w.token_ids[0] == g.token_ids[0], (
                    f"entry {i} starts with token {g.token_ids[0]}, not {w.token_ids[0]}"
                )
                off = max(abs(a - b) for a, b in zip(w.logprobs, g.logprobs, strict=True))
                assert off <= 1e-3, (
                    f"the log-probabilities of entry {i} are {off:.4f} off with draft tokens"
                )

    @common_causes(
        "keys and values of rejected draft tokens are used",
        "the draft model has not computed some tokens",
        "draft tokens are sampled with other noise or parameters",
        "the draft model's cache outlives its sequence",
    )
    def test_a_model_drafts_for_itself(self) -> None:
        """If the worker declares `drafts`: with draft tokens of its own, more in some rows of a
        step and fewer or none in others, and after preemption, each sequence has the same output as
        without. If a model drafts for itself, all draft tokens are accepted."""
        can = self.provider.capabilities
        if not (isinstance(can, WorkerCapabilities) and can.drafts):
            pytest.skip("the worker does not declare drafts")
        rng = random.Random(self.seed)
        asked = [
            replace(self.some(length, temperature=temperature, seed=length), more=more)
            for i, more in enumerate(SETTINGS)
            for length, temperature in ((3 + i, 0.0), (20 + 2 * i, 0.9))
        ]
        expected, driver = self.alone(asked), self.new_driver(drafts=True)

        def left(seq_id: int, output: list[int], most: int) -> list[int]:
            return [DRAFTED_BY_WORKER] * min(most, rng.randint(0, 5))

        ids = [driver.add(list(a.prompt), a.params, seed=a.seed, index=a.index) for a in asked]
        driver.generate_with_drafts(ids, NUM_TOKENS // 2, left)
        for i in ids[::3]:
            driver.release(i)
        got = driver.generate_with_drafts(ids, NUM_TOKENS, left)
        driver.worker.close()
        different = [i for i, (g, e) in enumerate(zip(got, expected, strict=True)) if g != e]
        assert not different, (
            f"{[asked[i] for i in different]} have other outputs with the worker's own draft tokens"
        )
        accepted = f"{driver.num_accepted} of {driver.num_drafted} draft tokens accepted"
        assert driver.num_accepted == driver.num_drafted > 0, (
            f"a model drafts for itself, but only {accepted}"
        )

    def guesses(self, rng: random.Random, coming: dict[int, list[int]], share_right: float) -> Any:
        """Return a function that proposes 0 to 5 draft tokens, each right with this probability."""

        def draft(seq_id: int, output: list[int], most: int) -> list[int]:
            count = min(most, rng.randint(0, 5))
            right = coming[seq_id][len(output) :][:count]
            return [
                t if rng.random() < share_right else (t + 1) % self.model.vocab_size for t in right
            ]

        return draft

    def new_sequence(self, asked: Asked) -> int:
        return self.driver.add(list(asked.prompt), asked.params, seed=asked.seed, index=asked.index)


def entries(state: SequenceState) -> list[TokenLogprobs]:
    return [
        entry for result, row in state.results if result.logprobs for entry in result.logprobs[row]
    ]
