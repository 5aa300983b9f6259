"""Random engines under random workloads: each request must say what it says alone, and leave
nothing behind.

"The same" is numerical equivalence in float32: where two tokens are too close to call, the
comparison ends. What a sample said up to there, and its log-probabilities within `TOLERANCE`, must
be equal.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from campaigns.base import Campaign, Report, Trial
from campaigns.leaks import assert_idle, assert_none_alive, mark, objects_of_requests
from dovetail import LLM, SamplingParams
from dovetail.frontend.outputs import Delta, RequestState
from dovetail.types import Request, TokenLogprobs
from dovetail_testing.tiny_model import HEAD_SIZE, KV_HEADS, LAYERS, TinyModel

MAX_LEN = 96
BYTES_PER_TOKEN = LAYERS * 2 * KV_HEADS * HEAD_SIZE * 4
TOLERANCE = 1e-3
CLOSE = 1e-4
"""Logits that are closer than this may change places with the shape of the batch."""
WORKLOADS_PER_ENGINE = 4
"""So that one meets what the one before it left."""
MODEL_SEED = 20_261


@dataclass
class Asked:
    """A request, who else is asked in one call with it, and after how many deltas it is left."""

    request: Request
    call: int
    whole: bool
    """Its news come at its end, as in `generate`."""
    left_after: int | None = None


@dataclass
class Workload:
    asked: list[Asked]
    arrivals: list[int]
    """By call: before which round it is begun."""


@dataclass
class Said:
    """All that came of one sample."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: Any = None
    stop_reason: Any = None

    def take(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.reason, self.stop_reason = delta.finish_reason, delta.stop_reason


Answers = dict[str, list[Said]]
"""By request id, the samples."""


# What is chosen at random.


def engine_settings(rng: random.Random) -> dict[str, Any]:
    """An engine, small enough that its parts meet: chunks, preemption, eviction, drafts, a host
    tier."""
    prefix: Any = rng.choice(["none", "hash", "hash", "hash"])
    if prefix == "hash":
        host = rng.choice([0, 0, 40 * BYTES_PER_TOKEN / 2**30, 400 * BYTES_PER_TOKEN / 2**30])
        prefix = {"use": "hash", "eviction": rng.choice(["lru", "lfu"]), "host_memory_gb": host}
    scheduler = rng.choice(
        ["fcfs", "priority"] if prefix == "none" else ["fcfs", "priority", "longest-prefix"]
    )
    speculation: Any = rng.choice(["none", "none", "ngram", "suffix"])
    if speculation != "none":
        speculation = {
            "use": speculation,
            "num_draft_tokens": rng.randint(1, 8),
            "adaptive": rng.random() < 0.3,
            "min_ngram": rng.randint(1, 2),
            "max_ngram": rng.randint(2, 4),
        }
    kv: dict[str, Any] = {"block_size": rng.choice([1, 4, 8, 16, 32])}
    if rng.random() < 0.6:  # enough for little more than one sequence
        num_tokens = rng.choice([1.0, 1.3, 2.0]) * MAX_LEN + 2 * kv["block_size"]
        kv["memory_gb"] = num_tokens * BYTES_PER_TOKEN / 2**30
    attention = (
        "attention-cpu"
        if kv["block_size"] in (16, 32) and rng.random() < 0.5
        else "torch-reference"
    )
    limits = {
        "max_num_seqs": rng.choice([1, 2, 4, 8, 8]),
        "max_num_batched_tokens": rng.choice([1, 5, 16, 40, 96, 200]),
    }
    return {
        "scheduler": {"use": scheduler, **limits},
        "prefix_cache": prefix,
        "speculation": speculation,
        "kv_cache": kv,
        "attention": attention,
        "overlap": rng.random() < 0.5,
        "max_num_waiting": rng.choice([4, 1024]),
    }


def prompt(rng: random.Random) -> list[int]:
    """Few tokens, so that prompts begin alike and drafters find what to copy."""
    head = [
        rng.choice([30, 31, 32]) + i % rng.choice([2, 3, 200])
        for i in range(rng.choice([0, 8, 33, 45]))
    ]
    return head + [rng.randrange(3, 261) for _ in range(rng.choice([1, 2, 7, 20]))]


def sampling(rng: random.Random) -> SamplingParams:
    def sometimes(value: Any, otherwise: Any, share: float = 0.25) -> Any:
        return value if rng.random() < share else otherwise

    most = rng.choice([1, 3, 12, 20, 30])
    values: dict[str, Any] = {
        "max_tokens": most,
        "seed": rng.randrange(2**31),
        "n": sometimes(rng.randint(2, 3), 1),
        "temperature": rng.choice([0, 0, 0.7, 1.0, 1.4]),
        "ignore_eos": rng.random() < 0.7,
        "top_k": sometimes(rng.choice([1, 5, 40]), 0),
        "top_p": sometimes(rng.choice([0.3, 0.9]), 1.0),
        "min_p": sometimes(0.05, 0.0),
        "repetition_penalty": sometimes(rng.choice([0.8, 1.3]), 1.0),
        "presence_penalty": sometimes(0.6, 0.0),
        "frequency_penalty": sometimes(-0.4, 0.0),
        "logit_bias": sometimes({rng.randrange(261): rng.uniform(-100, 8) for _ in range(3)}, {}),
        "min_tokens": sometimes(rng.randint(0, most), 0),
        "logprobs": sometimes(rng.randint(0, 4), None, 0.4),
        "prompt_logprobs": sometimes(rng.randint(0, 3), None, 0.2),
        "stop_token_ids": sometimes([rng.randrange(3, 261) for _ in range(12)], []),
        "stop": sometimes([chr(rng.randrange(33, 127)) for _ in range(6)] + ["ab", "the"], []),
        "include_stop_str_in_output": rng.random() < 0.3,
        "skip_special_tokens": rng.random() < 0.7,
    }
    if rng.random() < 0.1:  # only scored
        values |= {"max_tokens": 0, "min_tokens": 0, "prompt_logprobs": rng.randint(0, 3), "n": 1}
    return SamplingParams(**values)


def workload(rng: random.Random, maker: Any, name: str, most_waiting: int) -> Workload:
    num_calls, asked = rng.randint(1, 4), list[Asked]()
    for i in range(rng.randint(1, 8)):
        params = sampling(rng)
        if params.n > most_waiting:
            params = msgspec.structs.replace(params, n=1)
        request = maker.make(
            prompt(rng),
            params,
            request_id=f"{name}-{i}",
            priority=rng.randint(-1, 1),
            cache_salt=rng.choice([None, "a", "b"]),
        )
        left_after = rng.choice([0, 1, 2, 5]) if rng.random() < 0.05 else None
        asked.append(Asked(request, rng.randrange(num_calls), rng.random() < 0.5, left_after))
    return Workload(asked, [rng.choice([0, 0, 1, 4, 12]) for _ in range(num_calls)])


# How it is run, and compared.


def run_together(llm: LLM, work: Workload, rng: random.Random) -> Answers:
    """All calls at once, each advanced when chance has it. A call ends early with the first of its
    requests that is left."""
    said: Answers = {
        a.request.request_id: [Said() for _ in range(a.request.params.n)] for a in work.asked
    }
    waiting = [
        (arrival, [a for a in work.asked if a.call == call])
        for call, arrival in enumerate(work.arrivals)
        if any(a.call == call for a in work.asked)
    ]
    open_calls: list[tuple[Any, dict[str, int | None]]] = []
    num_rounds = 0
    while waiting or open_calls:
        for arrival, group in [w for w in waiting if w[0] <= num_rounds]:
            states = [RequestState(a.request, llm.tokenizer, stream=not a.whole) for a in group]
            open_calls.append(
                (llm._run(states), {a.request.request_id: a.left_after for a in group})
            )
            waiting.remove((arrival, group))
        num_rounds += 1
        if not open_calls:
            continue
        call = rng.choice(open_calls)
        deltas, left = call
        if any(count is not None and count <= 0 for count in left.values()):
            deltas.close()
            open_calls.remove(call)
            continue
        try:
            request_id, delta = next(deltas)
        except StopIteration:
            open_calls.remove(call)
            continue
        said[request_id][delta.index].take(delta)
        if left[request_id] is not None:
            left[request_id] -= 1  # type: ignore[operator]
    return said


def ask_alone(llm: LLM, request: Request) -> list[Said]:
    said = [Said() for _ in range(request.params.n)]
    for _, delta in llm._run([RequestState(request, llm.tokenizer)]):
        said[delta.index].take(delta)
    return said


class Comparison:
    """Between what requests said together and what a plain engine lets each of them say alone."""

    def __init__(self, alone: LLM, report: Report) -> None:
        self.alone, self.report = alone, report

    def check(self, work: Workload, together: Answers) -> None:
        for a in work.asked:
            expected = ask_alone(self.alone, a.request)
            for index, (got, want) in enumerate(
                zip(together[a.request.request_id], expected, strict=True)
            ):
                self.report.counts["samples compared"] += 1
                self.report.counts["tokens compared"] += len(got.token_ids)
                self._sample(a.request, index, got, want)

    def _sample(self, request: Request, index: int, got: Said, want: Said) -> None:
        who = (
            f"{request.request_id}[{index}] with {request.params}, prompt"
            f" {request.prompt_token_ids}"
        )
        same = 0
        for a, b in zip(got.token_ids, want.token_ids, strict=False):
            if a != b:
                break
            same += 1
        _close(got.logprobs[:same], want.logprobs[:same], f"log-probabilities of {who}")
        if same < min(len(got.token_ids), len(want.token_ids)):
            assert self._is_close_call(
                request, index, got.token_ids[: same + 1], want.token_ids[same]
            ), (
                f"token {same} of {who} is {got.token_ids[same]}, and alone {want.token_ids[same]};"
                f" all: {got.token_ids}, alone: {want.token_ids}"
            )
            self.report.counts["samples with a close call"] += 1
            return
        if got.reason is None or got.reason == "abort":  # left: what had come by then
            self.report.counts["samples left"] += 1
            assert want.text.startswith(got.text), (
                f"text of {who}: {got.text!r}, alone {want.text!r}"
            )
            return
        assert got.token_ids == want.token_ids, (
            f"tokens of {who}: {got.token_ids}, alone {want.token_ids}"
        )
        assert (got.text, got.reason, got.stop_reason) == (
            want.text,
            want.reason,
            want.stop_reason,
        ), (
            f"end of {who}: {(got.text, got.reason, got.stop_reason)}, alone"
            f" {(want.text, want.reason, want.stop_reason)}"
        )
        assert len(got.logprobs) == len(want.logprobs), (
            f"{len(got.logprobs)} log-probabilities of {who}"
        )
        if request.params.prompt_logprobs is not None and index == 0:
            num = len(request.prompt_token_ids) - 1
            assert len(got.prompt_logprobs) == num, (
                f"{len(got.prompt_logprobs)} of {num} prompt log-probabilities of {who}"
            )
        _close(got.prompt_logprobs, want.prompt_logprobs, f"prompt log-probabilities of {who}")

    def _is_close_call(self, request: Request, index: int, got: list[int], other: int) -> bool:
        """Whether a push of `CLOSE` to the logits makes the request say the same alone."""
        bias = dict(request.params.logit_bias)
        bias[got[-1]] = min(100, bias.get(got[-1], 0) + CLOSE)
        bias[other] = max(-100, bias.get(other, 0) - CLOSE)
        params = msgspec.structs.replace(request.params, logit_bias=bias)
        pushed = ask_alone(self.alone, msgspec.structs.replace(request, params=params))[index]
        return pushed.token_ids[: len(got)] == got


def _close(got: list[TokenLogprobs], want: list[TokenLogprobs], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=False)):
        known = dict(zip(b.token_ids, b.logprobs, strict=True))
        assert a.token_ids[0] == b.token_ids[0], (
            f"{what}: position {i} is of token {a.token_ids[0]}, alone {b.token_ids[0]}"
        )
        assert len(a.token_ids) == len(b.token_ids), (
            f"{what}: position {i} has {len(a.token_ids)} tokens"
        )
        for token, value in zip(a.token_ids, a.logprobs, strict=True):
            if token in known:  # of two that are too close to call, either may be among the best
                assert abs(value - known[token]) < TOLERANCE, (
                    f"{what}: position {i}: {value}, alone {known[token]}"
                )


# The campaign.


@contextlib.contextmanager
def tiny(**settings: Any) -> Iterator[LLM]:
    """Engines over one tiny model with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        TinyModel(MODEL_SEED).write(Path(folder))
        with LLM(folder, device="cpu", dtype="float32", max_model_len=MAX_LEN, **settings) as llm:
            yield llm


@contextlib.contextmanager
def opened(report: Report) -> Iterator[Trial]:
    """A trial is an engine and the workloads that it does one after another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tiny(
        attention="torch-reference", overlap=False, prefix_cache="none", speculation="none"
    ) as alone:
        comparison, before = Comparison(alone, report), objects_of_requests()

        def trial(seed: int) -> None:
            rng = random.Random(seed)
            settings = engine_settings(rng)
            try:
                with LLM(
                    alone.plan.folder,
                    device="cpu",
                    dtype="float32",
                    max_model_len=MAX_LEN,
                    **settings,
                ) as llm:
                    for i in range(WORKLOADS_PER_ENGINE):
                        _one(llm, rng, comparison, f"w{seed}-{i}")
                    stats = llm.engine.snapshot()
                    report.counts["preemptions"] += stats.num_preemptions
                    report.counts["draft tokens accepted"] += stats.num_accepted_tokens
                    report.counts["prompt tokens found in the prefix cache"] += (
                        stats.num_prefix_hit_tokens
                    )
                    report.counts["steps"] += stats.num_steps
                del llm
                assert_none_alive(before)
            except AssertionError as e:
                raise AssertionError(f"{e}\nengine: {settings}") from e

        yield trial
    torch.set_num_threads(threads)


def _one(llm: LLM, rng: random.Random, comparison: Comparison, name: str) -> None:
    work = workload(rng, llm._maker, name, llm.engine.max_num_waiting)
    first = mark(llm, rng.randrange(9_000))
    together = run_together(llm, work, rng)
    comparison.check(work, together)
    comparison.report.counts["workloads"] += 1
    comparison.report.counts["requests"] += len(work.asked)
    assert_idle(llm, first, {a.request.request_id for a in work.asked})
    comparison.report.counts["leak checks"] += 1
    if rng.random() < 0.2:
        llm.reset_prefix_cache()


WORKLOADS = Campaign(
    "workloads",
    "random engines under random workloads: each request as alone, and nothing left behind",
    opened,
    full=20_000 // WORKLOADS_PER_ENGINE,
    slice=4,
)
