"""Engines of a small model on the GPU: whether the ways in which steps can run give the same
tokens, and what memory they hold.

All in float32, so that the order of a sum decides between two tokens very seldom. `value` is the
share of equal tokens.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from typing import Any

import providers
import torch
from part_model import finish, memory_used, prompt_of, start, step
from rows import DRY, Row, Rows
from shapes import SMALL, TINY, checkpoint

from dovetail.engine.engine import Engine
from dovetail.types import Request, SamplingParams

NUM_TOKENS = 6 if DRY else 40
CONFIG = TINY if DRY else SMALL
KV_CACHE = {"memory_gb": 1}
"""Small enough for some engines at a time."""
Tokens = dict[str, list[int]]


def request(name: str, length: int, **params: Any) -> Request:
    given = SamplingParams(max_tokens=NUM_TOKENS, **params)
    return Request(
        name, prompt_of(length, len(name) + length), given, NUM_TOKENS, 1234 + length, []
    )


GREEDY = [
    request(f"greedy-{n}", n, temperature=0) for n in ((7, 20) if DRY else (1, 7, 40, 129, 300))
]
SAMPLED = [
    request("sampled", 9),
    request("top-p", 12, top_p=0.8),
    request("top-k", 30, top_k=20, temperature=0.7),
]
PENALIZED = [request("penalized", 11, frequency_penalty=0.5, repetition_penalty=1.2)]
LOGPROBS = request("log-probabilities", 15, logprobs=3, temperature=0)


def run(rows: Rows) -> None:
    before = memory_used()
    Tiny(rows).run()
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()
    rows.add(
        Row("GPU memory held after all engines are closed", (memory_used() - before) / 2**20, "MiB")
    )


class Tiny:
    """The attempts, and the engine and tokens that they compare with."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.model = checkpoint(CONFIG)
        self.engine: Engine | None = None
        self.expected: Tokens = {}

    def run(self) -> None:
        attempt = self.rows.attempt
        attempt("graphs", self.graphs)
        attempt("graphs: again", self.same_engine, "graphs: again", [*GREEDY, *SAMPLED])
        attempt(
            "plain",
            self.other_engine,
            "plain, not overlapped, beside graphs",
            {"execution": "plain"},
            False,
        )
        attempt(
            "not overlapped",
            self.other_engine,
            "graphs, not overlapped, beside overlapped",
            {},
            False,
        )
        attempt(
            "penalties",
            self.other_engine,
            "penalties: plain beside graphs",
            {"execution": "plain"},
            True,
            PENALIZED,
        )
        attempt("log-probabilities join", self.logprobs_join)
        attempt("two engines", self.two_engines)
        if self.engine is not None:
            self.engine.worker.close()
            self.engine = None
        for dtype in ("fp8", "int8"):
            attempt(
                f"KV cache in {dtype}",
                self.of_kind,
                f"KV cache in {dtype}",
                {"kv_cache": {**KV_CACHE, "dtype": dtype}},
            )
        for scheme in () if DRY else ("fp8", "int8"):
            given = {"quantization": scheme, "dtype": "bfloat16"}
            attempt(f"quantized to {scheme}", self.of_kind, f"quantized to {scheme}", given)
        first: Tokens = {}
        for name in () if DRY else providers.usable("attention"):
            if name != "torch-reference":
                attempt(f"attention {name}", self.attention_provider, name, first)

    def start(self, what: str, *, worker: dict[str, str] | None = None, **more: Any) -> Engine:
        given = {
            "model": self.model,
            "dtype": "float32",
            "kv_cache": KV_CACHE,
            "max_num_batched_tokens": 256,
            **more,
        }
        return start(self.rows, 8, 512, what, worker=worker, **given)

    def graphs(self) -> None:
        self.engine = self.start("graphs", worker={} if DRY else {"execution": "graphs"})
        self.expected = generate(self.engine, [*GREEDY, *SAMPLED])

    def same_engine(self, what: str, requests: Sequence[Request]) -> None:
        assert self.engine is not None, "there is no engine with graphs"
        self.compare(what, generate(self.engine, requests))

    def other_engine(
        self,
        what: str,
        worker: dict[str, str],
        overlap: bool,
        requests: Sequence[Request] = (*GREEDY, *SAMPLED),
    ) -> None:
        expected = None
        if requests is PENALIZED and self.engine is not None:
            expected = generate(self.engine, requests)
        built = self.start(what, worker=worker, overlap=overlap)
        try:
            self.compare(what, generate(built, requests), expected)
        finally:
            built.worker.close()

    def logprobs_join(self) -> None:
        """A request that asks for log-probabilities joins and leaves: the others go on with the
        same tokens."""
        assert self.engine is not None, "there is no engine with graphs"
        logprobs: list[Any] = []
        generated = generate(self.engine, [*GREEDY, *SAMPLED], joins=LOGPROBS, logprobs=logprobs)
        joined = generated.pop(LOGPROBS.request_id)
        self.compare("log-probabilities join: the other requests", generated)
        if len(joined) != NUM_TOKENS or len(logprobs) != NUM_TOKENS:
            raise AssertionError(
                f"{len(joined)} tokens and {len(logprobs)} log-probabilities instead of"
                f" {NUM_TOKENS}"
            )
        for token, one in zip(joined, logprobs, strict=True):
            is_sane = (
                all(math.isfinite(p) and p <= 0 for p in one.logprobs)
                and one.token_ids[0] == token
                and one.rank == 1
            )
            if not is_sane:
                raise AssertionError(f"of the greedy token {token}: {one}")
        alone = generate(self.engine, [LOGPROBS])
        self.compare(
            "log-probabilities join: the one that joined", {LOGPROBS.request_id: joined}, alone
        )

    def two_engines(self) -> None:
        """Graphs of two engines in one process: one is closed, the other goes on."""
        assert self.engine is not None, "there is no engine with graphs"
        other = self.start("second engine")
        try:
            self.compare("second engine", generate(other, [*GREEDY, *SAMPLED]))
            self.compare(
                "first engine beside a second one", generate(self.engine, [*GREEDY, *SAMPLED])
            )
        finally:
            other.worker.close()
        del other
        self.compare(
            "first engine after the second was closed", generate(self.engine, [*GREEDY, *SAMPLED])
        )

    def of_kind(self, what: str, config: dict[str, Any]) -> None:
        """An engine that computes other numbers: equal tokens are not expected, only that it
        runs."""
        built = self.start(what, **config)
        try:
            self.compare(
                f"{what}, beside float32", generate(built, [*GREEDY, *SAMPLED]), least=None
            )
        finally:
            built.worker.close()

    def attention_provider(self, name: str, first: Tokens) -> None:
        """In bfloat16 on heads of 128, beside the provider that was tried first."""
        what = f"attention {name}"
        built = self.start(
            what, model=checkpoint(CONFIG | {"head_dim": 128}), dtype="bfloat16", attention=name
        )
        try:
            generated = generate(built, GREEDY)
            self.compare(f"{what}, beside the first", generated, first or generated, least=None)
            first.update({} if first else generated)
        finally:
            built.worker.close()

    def compare(
        self,
        what: str,
        generated: Tokens,
        expected: Tokens | None = None,
        least: float | None = 1.0,
    ) -> None:
        expected = (
            {name: self.expected[name] for name in generated if name in self.expected}
            if expected is None
            else expected
        )
        if not expected:
            raise AssertionError("there is nothing to compare with")
        equal = total = 0
        first: dict[str, int] = {}
        for name, tokens in expected.items():
            differ = [
                i for i, (a, b) in enumerate(zip(tokens, generated[name], strict=False)) if a != b
            ]
            at = differ[0] if differ else min(len(tokens), len(generated[name]))
            equal, total = equal + at, total + len(tokens)
            if at < len(tokens):
                first[name] = at
        share = equal / max(total, 1)
        note = f"the first different token, by request: {first}" if first else f"{total} tokens"
        self.rows.add(Row(f"{what}: equal tokens", share, "", note, share, least))


def generate(
    built: Engine,
    requests: Sequence[Request],
    joins: Request | None = None,
    logprobs: list[Any] | None = None,
) -> Tokens:
    """Tokens of each request. After some steps one more joins, whose log-probabilities are kept."""
    generated: Tokens = {one.request_id: [] for one in requests}
    try:
        for one in requests:
            built.add(one)
        num_steps = 0
        while built.has_work:
            for output in step(built):
                generated.setdefault(output.request_id, []).extend(output.token_ids)
                if (
                    logprobs is not None
                    and joins is not None
                    and output.request_id == joins.request_id
                ):
                    logprobs.extend(output.logprobs)
            num_steps += 1
            if num_steps == 4 and joins is not None:
                built.add(joins)
            if num_steps > 50 * NUM_TOKENS:
                raise RuntimeError(f"{num_steps} steps have not ended {len(requests)} requests")
    finally:
        finish(built)
    if short := [name for name, tokens in generated.items() if len(tokens) != NUM_TOKENS]:
        raise AssertionError(f"not {NUM_TOKENS} tokens: {', '.join(short)}")
    return generated
