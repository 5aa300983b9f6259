"""The contract of the worker extension point, as tests. A plugin's test is a subclass:

    class TestMyWorker(WorkerContract):
        provider = PROVIDER

The worker is composed as an engine's is, for a tiny random Llama in float32, and compared with one
in plain Python.
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
"""Two logits closer than this may change places by rounding."""
NUM_DRAWS = 160_000
CRITICAL = 5.5
"""Standard deviations: for each of the eight likeliest tokens, a χ² test of it against all others
(one degree of freedom, χ² at most 5.5²). False alarms: in 3 of 10^7 runs of a correct sampler.
Power: a sampler that samples the likeliest token, of probability 1/2, one percentage point too
often is 8 standard deviations off in expectation, and is caught 994 times of 1000."""


def run_step(worker: Worker, plan: StepPlan) -> StepResult:
    return worker.sample(worker.submit(plan))


class WorkerContract(TierChecks, DraftChecks, WeightChecks):
    """Subclass, set `provider`, and pytest does the rest."""

    extension_point = "worker"

    # Composition and life.

    @common_causes(
        "an option whose value depends on the machine or the process",
        "an option that is no plain data",
    )
    def test_the_plan_travels(self) -> None:
        """The same composition gives the same plan fingerprint, also after the plan was sent to
        another process."""
        plans = [self.composed(self.folder / "model")[0] for _ in range(2)]
        prints = {p.fingerprint for p in (*plans, Plan.decode(plans[0].encode()))}
        assert len(prints) == 1, f"one composition has the fingerprints {sorted(prints)}"

    @common_causes(
        "a layer left out of the groups, or in two",
        "bytes of a block counted for keys or values alone",
    )
    def test_life(self) -> None:
        """`load` tells progress; `kv_groups` have each layer once, in blocks of the size
        configured; `close` is idempotent."""
        worker, reports = self.new_worker(self.folder / "model"), list[tuple[str, int, int]]()
        worker.load(lambda *report: reports.append(report))
        assert reports, "load reported no progress"
        assert reports[-1][1] == reports[-1][2], f"load ended with {reports[-1]}: done is not all"
        groups = worker.kv_groups()
        layers = sorted(i for g in groups for i in g.layers)
        assert layers == list(range(LAYERS)), f"the groups hold layers {layers} of {LAYERS}"
        for group in groups:
            least = BLOCK_SIZE * len(group.layers) * 2 * 16 * 4
            assert group.block_size == BLOCK_SIZE, (
                f"blocks have {group.block_size} tokens, configured are {BLOCK_SIZE}"
            )
            assert group.bytes_per_block >= least, (
                f"keys and values of a block have {least} bytes, not {group.bytes_per_block}"
            )
        assert 0 < worker.kv_memory() <= 2**28, (
            f"kv_memory is {worker.kv_memory()} where memory_gb allows {2**28}"
        )
        worker.close()
        worker.close()

    # What comes out.

    @pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
    @common_causes(
        "positions off by one",
        "the wrong half of a rotary pair",
        "the logits of another token than a row's last",
    )
    def test_greedy_is_the_references(self, length: int) -> None:
        """Greedy tokens are those of the reference, as long as its two best logits differ by more
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
                f"after a prompt of {length} tokens, token {i} is {token}, and the reference says"
                f" {best}"
            )
            logits = run.step(token)

    @common_causes(
        "log-probabilities after temperature or penalties: the raw ones are asked for",
        "the rank counted from 0",
    )
    def test_logprobs_are_the_references(self) -> None:
        """Log-probabilities of prompt and output are the raw model's, with the token that stands
        there first."""
        params = replace_params(GREEDY, temperature=0.7, logprobs=3, prompt_logprobs=2)
        prompt = [9, 8, 7, 100, 200, 5, 4]
        seq_id = self.driver.add(prompt, params, seed=5)
        self.driver.generate([seq_id], 5, chunk=3)
        told = self.driver.told[seq_id]
        self.driver.end([seq_id])
        given = [
            entry
            for result, row in told.results
            if result.prompt_logprobs
            for entry in result.prompt_logprobs[row]
        ]
        given += [
            entry
            for result, row in told.results
            if result.logprobs
            for entry in result.logprobs[row]
        ]
        expected = self.model.logits(told.tokens[:-1])
        assert len(given) == len(expected), (
            f"{len(expected)} tokens after the first have {len(given)} log-probabilities"
        )
        for i, (entry, logits) in enumerate(zip(given, expected, strict=True)):
            token, probabilities = told.tokens[i + 1], softmax(logits)
            k = 2 if i + 1 < len(prompt) else 3
            assert len(entry.token_ids) == k + 1, (
                f"token {i + 1} has {len(entry.token_ids) - 1} likeliest; {k} were asked for"
            )
            assert entry.token_ids[0] == token, (
                f"token {i + 1} is {token}, and its entry begins with {entry.token_ids[0]}"
            )
            least = sorted(logits, reverse=True)[k - 1] - MARGIN
            assert all(logits[t] >= least for t in entry.token_ids[1:]), (
                f"token {i + 1}: {entry.token_ids[1:]} are not likeliest"
            )
            rank = 1 + sum(x > logits[token] + MARGIN for x in logits)
            assert (
                rank <= entry.rank <= rank + sum(abs(x - logits[token]) <= MARGIN for x in logits)
            ), f"token {i + 1} has rank {entry.rank}, and the reference says {rank}"
            for t, logprob in zip(entry.token_ids, entry.logprobs, strict=True):
                want = math.log(probabilities[t])
                assert abs(logprob - want) <= 1e-3, (
                    f"token {i + 1}: log-probability {logprob:.5f} of {t} is not {want:.5f}"
                )

    # Sameness: however it is computed.

    @pytest.mark.parametrize("chunk", [1, 5, 16, 31])
    @common_causes(
        "positions that begin at 0 with each chunk", "a row that samples before its last token"
    )
    def test_chunks_are_the_whole(self, chunk: int) -> None:
        """A prompt computed in chunks gives what it gives in one step."""
        self.same_both_ways(
            lambda d, ids, _: d.generate(ids, 8, chunk=chunk),
            f"in chunks of {chunk}",
            [self.some(40)],
        )

    @common_causes(
        "rows that read each other's logits, tables or positions", "padding that is taken for a row"
    )
    def test_a_batch_is_each_alone(self) -> None:
        """Sequences of many lengths, greedy and sampled, give together what each gives alone."""
        asked = [
            self.some(n, temperature=t, seed=n) for n in (1, 2, 16, 33, 70) for t in (0.0, 0.8)
        ]
        self.same_both_ways(lambda d, ids, _: d.generate(ids, 10), "together", asked)

    @common_causes(
        "tokens, penalties or tables of a batch row kept from before",
        "a released sequence that is still looked up",
    )
    def test_preemption_changes_nothing(self) -> None:
        """Released and started again with its output so far, beside others, in other blocks, a
        sequence goes on as before."""

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

    @common_causes("a batch row's last token kept for the next sequence that sits there")
    def test_an_id_may_be_used_again(self) -> None:
        """A sequence released and another one started under the same id in one plan are two
        sequences."""
        old, new = self.some(30), self.some(11)
        expected = self.alone([new])
        driver = self.driver
        seq_id = driver.add(list(old.prompt))
        driver.generate([seq_id], 5)
        driver.release(seq_id)
        told = driver.told[seq_id]
        told.tokens, told.num_prompt = list(new.prompt), len(new.prompt)
        got = driver.generate([seq_id], 8)
        driver.end([seq_id])
        assert got == [expected[0][:8]], f"it said {got[0]}, and alone {expected[0][:8]}"

    @common_causes(
        "the next step's input taken from the plan, which cannot know it",
        "results returned out of order",
    )
    def test_steps_in_flight(self) -> None:
        """A step may be submitted before the last one's tokens are asked for: its input is what
        that one samples."""
        asked = [self.some(n, temperature=t, seed=n) for n in (5, 16, 31) for t in (0.0, 0.8)]
        expected = self.alone(asked)
        driver = self.new_driver(overlap=True)
        try:
            ids = [driver.add(list(a.prompt), a.params, seed=a.seed) for a in asked]
            plan = driver.plan([(i, len(driver.told[i].tokens)) for i in ids])
            waiting = (plan, driver.worker.submit(plan))
            for _ in range(9):
                for i in ids:
                    driver.told[i].tokens.append(-1)  # coming, and not known
                plan = driver.plan([(i, 1) for i in ids])
                ahead = (plan, driver.worker.submit(plan))
                for i in ids:
                    driver.told[i].tokens.pop()
                driver.take(*waiting)
                waiting = ahead
            driver.take(*waiting)
            got = [driver.told[i].output for i in ids]
        finally:
            driver.worker.close()
        assert got == [e[:10] for e in expected], (
            f"with steps in flight they said {got}, and alone {expected}"
        )

    # Drawing.

    @common_causes(
        "a generator shared by the rows of a step",
        "noise keyed by the row or the step instead of the position",
    )
    def test_seeds(self) -> None:
        """Noise is keyed by seed, sample index and position: the same key gives the same tokens,
        another key others."""
        base = self.some(9, temperature=1.5, seed=77)
        asked = [base, replace(base, index=1), replace(base, seed=78), base]
        first, index, other, again = self.together(asked)
        assert first == again, f"one seed gave {first} and {again} in one batch"
        assert len({tuple(x) for x in (first, index, other)}) == 3, (
            "another seed or sample index gave the same tokens"
        )
        assert len(set(first)) > 1, f"12 samples at temperature 1.5 are all alike: {first}"

    @common_causes(
        "top-p or temperature rounded in a narrow type", "noise that never reaches the tails"
    )
    def test_draws_follow_the_distribution(self) -> None:
        """Over many seeds tokens are sampled as often as the model says: the likeliest, and the
        likeliest eight, within 5.5 standard deviations of what is expected."""
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
        driver.told.clear()
        total = sum(counts.values())
        for token in sorted(counts, key=lambda t: -probabilities[t])[:8]:
            p = probabilities[token]
            off = (counts[token] - total * p) / math.sqrt(total * p * (1 - p))
            assert abs(off) <= CRITICAL, (
                f"token {token} has probability {p:.4f}, and was sampled {counts[token]} times of"
                f" {total}: {counts[token] / total:.4f}, {off:+.1f} standard deviations off"
            )

    @common_causes(
        "a parameter of one row applied to all rows",
        "min_tokens that holds back one end token of several",
    )
    def test_sampling_parameters(self) -> None:
        """top_k 1 is greedy; a bias of ±100 decides; before min_tokens no end token is sampled; a
        mask leaves what it allows."""
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
        got = driver.told[seq_id].output
        assert got == [allowed], f"a mask that allows {allowed} alone gave {got}"

    # What goes wrong.

    @common_causes(
        "an exception caught and answered with a made-up token",
        "a table changed before the plan was looked at",
    )
    def test_a_bad_step_is_an_error_and_no_more(self) -> None:
        """A plan with a row of an unknown sequence raises in `submit` or `sample`, and the steps
        after it are as ever."""
        driver, asked = self.driver, self.some(12)
        expected = self.alone([asked])[0]
        seq_id = driver.add(list(asked.prompt))
        driver.generate([seq_id], 3)
        bad = StepPlan(10**6, [987_654_321], [1], [4], [True], [[]])
        answer = error_of(lambda: driver.worker.sample(driver.worker.submit(bad)))
        assert isinstance(answer, Exception), (
            f"a row of an unknown sequence was answered with {answer}"
        )
        got = driver.generate([seq_id], 10)[0]
        driver.end([seq_id])
        assert got == expected[:10], (
            f"after a step that failed it said {got}, and else {expected[:10]}"
        )

    @common_causes("NaN logits whose argmax is taken all the same")
    def test_nan_is_no_token(self) -> None:
        """Where the logits are NaN the row is in `failed`, or the step raises; no token is made
        up."""
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
                assert failed, f"all logits are NaN, and the row was answered: {result}"
        finally:
            driver.worker.close()

    @pytest.mark.parametrize("damage", ["missing", "truncated", "renamed"])
    @common_causes(
        "an error of the file library passed on as it is",
        "tensors left at random where the file has none",
    )
    def test_a_damaged_checkpoint_is_named(self, damage: str) -> None:
        """A checkpoint whose weights are missing, cut short or called something else is a
        `CheckpointError` from `load` that names the file or the tensor."""
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
        assert error is not None, f"weights that are {damage} were loaded without a word"
        assert isinstance(error, CheckpointError), (
            f"load raised {type(error).__name__}: a CheckpointError is asked for"
        )
        named = any(name in error.message for name in (str(folder), "o_proj", "x_proj"))
        assert named, f"the error names neither file nor tensor: {error.message}"
