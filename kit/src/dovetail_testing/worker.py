"""Test the contract of the worker extension point. A plugin's test is a subclass:

    class TestMyWorker(WorkerContract):
        provider = PROVIDER

The worker is composed as in an engine, for a tiny random Llama in float32, and compared with an
implementation in plain Python.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial

import pytest

from dovetail.errors import CheckpointError
from dovetail.interfaces.worker import Worker
from dovetail.plan import Plan
from dovetail.types import StepPlan, StepResult
from dovetail_testing.contract import common_causes
from dovetail_testing.tiny_model import LAYERS, softmax
from dovetail_testing.worker_drafts import DraftChecks
from dovetail_testing.worker_driver import EOS, GREEDY, Driver
from dovetail_testing.worker_tiers import TierChecks
from dovetail_testing.worker_trial import (
    BLOCK_SIZE,
    SEATS,
    Asked,
    error_of,
    no_progress,
    replace_params,
    temperature_for,
)
from dovetail_testing.worker_weights import WeightChecks

MARGIN = 1e-4
"""Two logits closer than this may be ordered differently because of rounding."""
NUM_DRAWS = 160_000
CRITICAL = 5.5
"""Standard deviations: for each of the eight most likely tokens, a χ² test against all others (one
degree of freedom, χ² at most 5.5²). False alarms: 3 of 10^7 runs of a correct sampler. Power: a
sampler that samples the most likely token, of probability 1/2, one percentage point too often is
off by 8 standard deviations on average, and is detected in 994 of 1000 runs."""


def run_step(worker: Worker, plan: StepPlan) -> StepResult:
    return worker.sample(worker.submit(plan))


class WorkerContract(TierChecks, DraftChecks, WeightChecks):
    """The contract of workers. Subclass it and set `provider`."""

    extension_point = "worker"

    # Composition and life cycle.

    @common_causes(
        "the value of an option depends on the machine or the process",
        "an option is not plain data",
    )
    def test_the_plan_travels(self) -> None:
        """The same engine config gives the same plan fingerprint, even after the plan was sent to
        another process."""
        plans = [self.composed(self.folder / "model")[0] for _ in range(2)]
        prints = {p.fingerprint for p in (*plans, Plan.decode(plans[0].encode()))}
        assert len(prints) == 1, f"one engine config has the fingerprints {sorted(prints)}"

    @common_causes(
        "a layer is missing in the groups, or is in two",
        "the bytes of a block count only keys or only values",
    )
    def test_life(self) -> None:
        """`load` reports progress; `kv_groups` contain each layer once, in blocks of the configured
        size; `close` may be called twice."""
        worker, reports = self.new_worker(self.folder / "model"), list[tuple[str, int, int]]()
        worker.load(lambda *report: reports.append(report))
        assert reports, "load reported no progress"
        assert reports[-1][1] == reports[-1][2], (
            f"load ended with {reports[-1]}: it is not complete"
        )
        groups = worker.kv_groups()
        layers = sorted(i for g in groups for i in g.layers)
        assert layers == list(range(LAYERS)), f"the groups have layers {layers} of {LAYERS}"
        for group in groups:
            least = BLOCK_SIZE * len(group.layers) * 2 * 16 * 4
            assert group.block_size == BLOCK_SIZE, (
                f"blocks have {group.block_size} tokens, but {BLOCK_SIZE} are configured"
            )
            assert group.bytes_per_block >= least, (
                f"keys and values of a block need {least} bytes, not {group.bytes_per_block}"
            )
        assert 0 < worker.kv_memory() <= 2**28, (
            f"kv_memory is {worker.kv_memory()} but memory_gb allows {2**28}"
        )
        worker.close()
        worker.close()

    # Outputs.

    @pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
    @common_causes(
        "positions are off by one",
        "the wrong half of a rotary pair is used",
        "a row returns the logits of a token that is not its last",
    )
    def test_greedy_is_the_references(self, length: int) -> None:
        """Greedy tokens equal those of the reference, as long as its two best logits differ by more
        than 1e-4."""
        rng = random.Random(self.seed + length)
        prompt = [rng.randrange(self.model.vocab_size) for _ in range(length)]
        seq_id = self.driver.add(prompt)
        (output,) = self.driver.generate([seq_id], 12)
        self.driver.end([seq_id])
        run = self.model.run()
        logits = [run.step(t) for t in prompt][-1]
        for i, token in enumerate(output):
            best, second = sorted(range(len(logits)), key=logits.__getitem__)[:-3:-1]
            if logits[best] - logits[second] <= MARGIN:
                return
            assert token == best, (
                f"after a prompt of {length} tokens, token {i} is {token}, but the reference has"
                f" {best}"
            )
            logits = run.step(token)

    @common_causes(
        "log-probabilities are computed after temperature or penalties, not from raw logits",
        "ranks are counted from 0",
    )
    def test_logprobs_are_the_references(self) -> None:
        """Log-probabilities of prompt and output are those of the raw model; the first entry is the
        token at the position."""
        params = replace_params(GREEDY, temperature=0.7, logprobs=3, prompt_logprobs=2)
        prompt = [9, 8, 7, 100, 200, 5, 4]
        seq_id = self.driver.add(prompt, params, seed=5)
        self.driver.generate([seq_id], 5, chunk=3)
        state = self.driver.sequences[seq_id]
        self.driver.end([seq_id])
        given = [
            entry
            for result, row in state.results
            if result.prompt_logprobs
            for entry in result.prompt_logprobs[row]
        ]
        given += [
            entry
            for result, row in state.results
            if result.logprobs
            for entry in result.logprobs[row]
        ]
        expected = self.model.logits(state.tokens[:-1])
        assert len(given) == len(expected), (
            f"{len(expected)} tokens after the first, but {len(given)} log-probabilities"
        )
        for i, (entry, logits) in enumerate(zip(given, expected, strict=True)):
            token, probabilities = state.tokens[i + 1], softmax(logits)
            k = 2 if i + 1 < len(prompt) else 3
            assert len(entry.token_ids) == k + 1, (
                f"token {i + 1} has {len(entry.token_ids) - 1} likely tokens; {k} were requested"
            )
            assert entry.token_ids[0] == token, (
                f"token {i + 1} is {token}, but its entry begins with {entry.token_ids[0]}"
            )
            least = sorted(logits, reverse=True)[k - 1] - MARGIN
            assert all(logits[t] >= least for t in entry.token_ids[1:]), (
                f"token {i + 1}: {entry.token_ids[1:]} are not the most likely tokens"
            )
            rank = 1 + sum(x > logits[token] + MARGIN for x in logits)
            assert (
                rank <= entry.rank <= rank + sum(abs(x - logits[token]) <= MARGIN for x in logits)
            ), f"token {i + 1} has rank {entry.rank}, but the reference has {rank}"
            for t, logprob in zip(entry.token_ids, entry.logprobs, strict=True):
                want = math.log(probabilities[t])
                assert abs(logprob - want) <= 1e-3, (
                    f"token {i + 1}: log-probability {logprob:.5f} of {t} is not {want:.5f}"
                )

    # Equal results, however they are computed.

    @pytest.mark.parametrize("chunk", [1, 5, 16, 31])
    @common_causes("positions start at 0 in each chunk", "a row samples before its last token")
    def test_chunks_are_the_whole(self, chunk: int) -> None:
        """A prompt computed in chunks gives the same output as in one step."""
        self.same_both_ways(
            lambda d, ids, _: d.generate(ids, 8, chunk=chunk),
            f"in chunks of {chunk}",
            [self.some(40)],
        )

    @common_causes(
        "rows read the logits, tables or positions of other rows", "padding is treated as a row"
    )
    def test_a_batch_is_each_alone(self) -> None:
        """Sequences of many lengths, greedy and sampled, have the same output in a batch as
        alone."""
        asked = [
            self.some(n, temperature=t, seed=n) for n in (1, 2, 16, 33, 70) for t in (0.0, 0.8)
        ]
        self.same_both_ways(lambda d, ids, _: d.generate(ids, 10), "together", asked)

    @common_causes(
        "a batch index keeps tokens, penalties or tables of its previous sequence",
        "a released sequence is still looked up",
    )
    def test_preemption_changes_nothing(self) -> None:
        """A sequence that is released and started again with its output so far, beside others and
        in other blocks, continues as before."""

        def preempted(driver: Driver, ids: list[int], expected: list[list[int]]) -> list[list[int]]:
            driver.generate(ids, 4)
            for i in reversed(ids[::2]):
                driver.release(i)
            driver.generate(ids[1::2], 6)
            for i in ids[1::2]:
                driver.release(i)
            driver.generate(ids[::2], 9)
            return driver.generate(ids, 12, chunk=7)

        asked = [self.some(n, temperature=t, seed=n) for n in (3, 20, 37) for t in (0.0, 0.9)]
        self.same_both_ways(preempted, "with preemption", asked)

    @common_causes("a batch index keeps the last token of its previous sequence")
    def test_an_id_may_be_used_again(self) -> None:
        """A sequence that is released and another one that is started under the same id in one plan
        are two sequences."""
        old, new = self.some(30), self.some(11)
        expected = self.alone([new])
        driver = self.driver
        seq_id = driver.add(list(old.prompt))
        driver.generate([seq_id], 5)
        driver.release(seq_id)
        state = driver.sequences[seq_id]
        state.tokens, state.num_prompt = list(new.prompt), len(new.prompt)
        got = driver.generate([seq_id], 8)
        driver.end([seq_id])
        assert got == [expected[0][:8]], (
            f"its output is {got[0]}, but alone it is {expected[0][:8]}"
        )

    @common_causes(
        "the next step's input is read from the plan, which cannot contain it",
        "results are returned out of order",
    )
    def test_steps_in_flight(self) -> None:
        """A step may be submitted before the tokens of the previous step have been fetched: its
        input is what that step samples."""
        asked = [self.some(n, temperature=t, seed=n) for n in (5, 16, 31) for t in (0.0, 0.8)]
        expected = self.alone(asked)
        driver = self.new_driver(overlap=True)
        try:
            ids = [driver.add(list(a.prompt), a.params, seed=a.seed) for a in asked]
            plan = driver.plan([(i, len(driver.sequences[i].tokens)) for i in ids])
            waiting = (plan, driver.worker.submit(plan))
            for _ in range(9):
                for i in ids:
                    driver.sequences[i].tokens.append(-1)  # in flight, not known yet
                plan = driver.plan([(i, 1) for i in ids])
                ahead = (plan, driver.worker.submit(plan))
                for i in ids:
                    driver.sequences[i].tokens.pop()
                driver.take(*waiting)
                waiting = ahead
            driver.take(*waiting)
            got = [driver.sequences[i].output for i in ids]
        finally:
            driver.worker.close()
        assert got == [e[:10] for e in expected], (
            f"with steps in flight the outputs are {got}, but alone {expected}"
        )

    # Sampling.

    @common_causes(
        "the rows of a step share a generator",
        "noise is keyed by the row or the step instead of the position",
    )
    def test_seeds(self) -> None:
        """Noise is keyed by seed, sample index and position: the same key gives the same tokens, a
        different key gives different ones."""
        base = self.some(9, temperature=1.5, seed=77)
        asked = [base, replace(base, index=1), replace(base, seed=78), base]
        first, index, other, again = self.together(asked)
        assert first == again, f"one seed gave {first} and {again} in one batch"
        assert len({tuple(x) for x in (first, index, other)}) == 3, (
            "a different seed or sample index gave the same tokens"
        )
        assert len(set(first)) > 1, f"12 samples at temperature 1.5 are all equal: {first}"

    @common_causes(
        "top-p or temperature is rounded in a narrow type", "the noise never reaches the tails"
    )
    def test_draws_follow_the_distribution(self) -> None:
        """Over many seeds, each of the eight most likely tokens is sampled as often as the model
        predicts, within 5.5 standard deviations."""
        logits = self.model.logits([42])[0]
        temperature = temperature_for(logits, 0.5)
        probabilities = softmax([x / temperature for x in logits])
        counts = dict.fromkeys(range(len(logits)), 0)
        driver, rng = self.driver, random.Random(self.seed)
        params = replace_params(GREEDY, temperature=temperature, max_tokens=1)
        for _ in range(NUM_DRAWS // SEATS):
            ids = [driver.add([42], params, seed=rng.randrange(2**63)) for _ in range(SEATS)]
            for new in driver.generate(ids, 1):
                counts[new[0]] += 1
            driver.end(ids)
        driver.sequences.clear()
        total = sum(counts.values())
        for token in sorted(counts, key=lambda t: -probabilities[t])[:8]:
            p = probabilities[token]
            off = (counts[token] - total * p) / math.sqrt(total * p * (1 - p))
            assert abs(off) <= CRITICAL, (
                f"token {token} has probability {p:.4f}, but was sampled {counts[token]} times of"
                f" {total}: {counts[token] / total:.4f}, {off:+.1f} standard deviations off"
            )

    @common_causes(
        "a parameter of one row is applied to all rows",
        "min_tokens suppresses only one of several end-of-sequence tokens",
    )
    def test_sampling_parameters(self) -> None:
        """top_k 1 is greedy; a bias of ±100 decides; before min_tokens no end-of-sequence token is
        sampled; a mask leaves only what it allows."""
        driver, prompt = self.driver, [3, 50, 60, 70]
        greedy = self.alone([Asked(tuple(prompt))])[0][:6]
        endless = driver.add(prompt, replace_params(GREEDY, logit_bias={EOS: -100.0}))
        (without_end,) = driver.generate([endless], 6)
        driver.end([endless])
        variants = {
            "top_k=1": (replace_params(GREEDY, temperature=1.0, top_k=1), greedy),
            "top_p=1e-6": (replace_params(GREEDY, temperature=1.0, top_p=1e-6), greedy),
            "min_p=1": (replace_params(GREEDY, temperature=1.0, min_p=1.0), greedy),
            "logit_bias={77: 100}": (replace_params(GREEDY, logit_bias={77: 100.0}), [77] * 6),
            "min_tokens, and a bias to end": (
                replace_params(GREEDY, min_tokens=6, logit_bias={EOS: 100.0}),
                without_end,
            ),
        }
        ids = [driver.add(prompt, params, seed=3) for params, _ in variants.values()]
        for (name, (_, expected)), got in zip(
            variants.items(), driver.generate(ids, 6), strict=True
        ):
            assert got == expected, f"{name} gave {got} instead of {expected}"
        driver.end(ids)
        seq_id, allowed = driver.add(prompt), 133
        mask = bytearray(-(-self.model.vocab_size // 8))
        mask[allowed // 8] |= 1 << allowed % 8
        driver.step([(seq_id, len(prompt))], {seq_id: bytes(mask)})
        driver.end([seq_id])
        got = driver.sequences[seq_id].output
        assert got == [allowed], f"a mask that allows only {allowed} gave {got}"

    # Failures.

    @common_causes(
        "an exception is caught and replaced by a made-up token",
        "a table is changed before the plan has been checked",
    )
    def test_a_bad_step_is_an_error_and_no_more(self) -> None:
        """A plan with a row of an unknown sequence raises in `submit` or `sample`, and later steps
        are not affected."""
        driver, asked = self.driver, self.some(12)
        expected = self.alone([asked])[0]
        seq_id = driver.add(list(asked.prompt))
        driver.generate([seq_id], 3)
        bad = StepPlan(10**6, [987_654_321], [1], [4], [True], [[]])
        answer = error_of(lambda: driver.worker.sample(driver.worker.submit(bad)))
        assert isinstance(answer, Exception), (
            f"a row of an unknown sequence was accepted, with result {answer}"
        )
        got = driver.generate([seq_id], 10)[0]
        driver.end([seq_id])
        assert got == expected[:10], (
            f"after a failed step the output is {got}, but otherwise {expected[:10]}"
        )

    @common_causes("the argmax of NaN logits is returned as a token")
    def test_nan_is_no_token(self) -> None:
        """If the logits are NaN, the row is in `failed`, or the step raises; no token is
        returned."""
        folder = self.folder / "nan"
        if not folder.exists():
            self.model.write(folder, broken=True)
        driver = self.new_driver(folder)
        try:
            for params in (GREEDY, replace_params(GREEDY, temperature=1.0)):
                seq_id = driver.add([1, 2, 3], params)
                plan = driver.plan([(seq_id, 3)])
                result = error_of(partial(run_step, driver.worker, plan))
                failed = isinstance(result, Exception) or seq_id in result.failed
                assert failed, f"all logits are NaN, but the row has a result: {result}"
        finally:
            driver.worker.close()

    @pytest.mark.parametrize("damage", ["missing", "truncated", "renamed"])
    @common_causes(
        "an error of the file library is not converted",
        "tensors that are missing in the file keep random values",
    )
    def test_a_damaged_checkpoint_is_named(self, damage: str) -> None:
        """If weights are missing, truncated or have other names, `load` raises a `CheckpointError`
        that names the file or the tensor."""
        folder = self.folder / damage
        if not folder.exists():
            self.model.write(folder)
        weights = folder / "model.safetensors"
        data = weights.read_bytes() if weights.exists() else b""
        if damage == "missing":
            weights.unlink(missing_ok=True)
        else:
            weights.write_bytes(
                data[:-100] if damage == "truncated" else data.replace(b"o_proj", b"x_proj")
            )
        worker = self.new_worker(folder)
        error = error_of(lambda: worker.load(no_progress))
        worker.close()
        assert error is not None, f"weights that are {damage} were loaded without an error"
        assert isinstance(error, CheckpointError), (
            f"load raised {type(error).__name__}: it must raise CheckpointError"
        )
        named = any(name in error.message for name in (str(folder), "o_proj", "x_proj"))
        assert named, f"the error names neither file nor tensor: {error.message}"
