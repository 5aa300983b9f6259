"""1000 requests of mixed lengths on the 8B Llama shape, beside transformers on the same ones: one
batch after the other by `generate`, and its continuous batching where it has some."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
from rows import DEVICE, DRY, Row, Rows
from shapes import CONFIG, engine

from dovetail.engine.engine import Engine
from dovetail.types import Request, SamplingParams

COUNT = 4 if DRY else 1000
PEER_COUNT = 2 if DRY else 64
"""Of the same requests: transformers takes long."""


Prompts = list[tuple[list[int], int]]
"""Prompts, and how many tokens are to be generated for each."""


def run(rows: Rows) -> None:
    requests = mixed_requests(COUNT)
    built = engine(4 if DRY else 256, 64 if DRY else 2048)
    try:
        ours = ours_per_second(built, requests)
    finally:
        built.worker.close()
    rows.add(Row(f"{COUNT} requests, tokens generated", ours, "tok/s"))
    for name, run_peer, goal in (
        ("generate", generate, 23.0),
        ("continuous batching", continuous, 3.0),
    ):
        rows.attempt(
            f"transformers {name}",
            beside,
            rows,
            name,
            run_peer,
            requests[:PEER_COUNT],
            ours,
            goal,
            seconds=200,
        )


def beside(
    rows: Rows,
    name: str,
    run_peer: Callable[[Prompts], float],
    requests: Prompts,
    ours: float,
    goal: float,
) -> None:
    theirs = run_peer(requests)
    rows.add(Row(f"transformers {name}, {len(requests)} of them", theirs, "tok/s"))
    rows.add(
        Row(f"beside transformers {name}", ours, "tok/s", "times as many", ours / theirs, goal)
    )


def mixed_requests(count: int) -> Prompts:
    rng = random.Random(0)
    longest, most = (30, 8) if DRY else (1024, 512)
    return [
        (
            [rng.randrange(3, 400) for _ in range(rng.randint(4 if DRY else 32, longest))],
            rng.randint(4, most),
        )
        for _ in range(count)
    ]


def ours_per_second(built: Engine, requests: Prompts) -> float:
    """Tokens generated a second, when all requests come at once."""
    for i, (prompt, count) in enumerate(requests):
        built.add(Request(str(i), prompt, SamplingParams(max_tokens=count), count, 0, []))
    start, num_generated = time.perf_counter(), 0
    while built.has_work:
        for output in built.step():
            assert output.error is None, output.error
            num_generated += len(output.token_ids)
    taken = time.perf_counter() - start
    assert num_generated == sum(count for _, count in requests)
    return num_generated / taken


def model() -> torch.nn.Module:
    import transformers

    not_its = ("architectures", "torch_dtype", "model_type")
    config = transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in not_its})
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def generate(requests: Prompts) -> float:
    """One request after the other, as `generate` is mostly called."""
    peer, num_generated, start = model(), 0, 0.0
    some = requests[: max(1, PEER_COUNT // 8)]
    for i, (prompt, count) in enumerate([some[0], *some]):
        if i == 1:
            start = time.perf_counter()  # the first one is to warm up
        ids = torch.tensor([prompt], device=DEVICE)
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        num_generated += (out.shape[1] - len(prompt)) * (i > 0)
    return num_generated / (time.perf_counter() - start)


def continuous(requests: Prompts) -> float:
    import transformers

    peer = model()
    longest = max(count for _, count in requests)
    config = transformers.GenerationConfig(
        max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    start = time.perf_counter()
    out = peer.generate_batch(inputs=[prompt for prompt, _ in requests], generation_config=config)
    taken = time.perf_counter() - start
    return sum(len(o.generated_tokens) for o in out.values()) / taken
