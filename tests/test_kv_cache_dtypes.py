"""KV caches of one byte in engines: near to the plain one, half as large, with scales from the
checkpoint or from the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Checkpoint

from dovetail import LLM, SamplingParams
from dovetail.errors import ConfigError

NUM_LOGPROBS = 10
PROMPT = [5, 80, 33, 7, 100, 4, 61, 9, 150, 12, 13, 40] * 3


def logprobs(
    folder: Path | str, prompt: Any = PROMPT, max_len: int = 128, **values: Any
) -> list[dict[int, float]]:
    """At each position, chunk by chunk, so that the cache is read."""
    scheduler = {"max_num_batched_tokens": 7}
    with LLM(
        folder, dtype="float32", device="cpu", scheduler=scheduler, max_model_len=max_len, **values
    ) as llm:
        params = SamplingParams(
            max_tokens=4,
            temperature=0,
            prompt_logprobs=NUM_LOGPROBS,
            logprobs=NUM_LOGPROBS,
            ignore_eos=True,
        )
        (out,) = llm.generate([prompt], params)
        assert out.prompt_logprobs
        assert out.logprobs
        return [*(position for position in out.prompt_logprobs if position), *out.logprobs[:1]]


def distance(ours: list[dict[int, float]], theirs: list[dict[int, float]]) -> float:
    """Mean, over positions, of the largest difference."""
    assert len(ours) == len(theirs)
    return sum(
        max(abs(a[t] - b[t]) for t in a.keys() & b.keys())
        for a, b in zip(ours, theirs, strict=True)
    ) / len(ours)


@pytest.mark.parametrize("attention", ["attention-cpu", "torch-reference"])
@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_one_byte_is_near_the_plain_cache(
    dtype: str, attention: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    folder = checkpoint("llama-3.1").folder
    plain = logprobs(folder, attention=attention)
    found = distance(logprobs(folder, attention=attention, kv_cache={"dtype": dtype}), plain)
    assert 1e-5 < found < 0.3


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_both_attentions_hold_the_same(dtype: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    folder = checkpoint("qwen2").folder  # biases, windows
    ours, theirs = (
        logprobs(folder, attention=name, kv_cache={"dtype": dtype})
        for name in ("attention-cpu", "torch-reference")
    )
    assert distance(ours, theirs) < 0.05


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "float8_e4m3fn", "int8"])
def test_twice_the_blocks_of_16_bits(dtype: str) -> None:
    def blocks(name: str) -> tuple[int, int]:
        with LLM("demo", device="cpu", kv_cache={"memory_gb": 0.05, "dtype": name}) as llm:
            return llm.engine.kv.groups[0].bytes_per_block, llm.engine.snapshot().kv_blocks_total

    (plain_bytes, plain_blocks), (num_bytes, num_blocks) = blocks("bfloat16"), blocks(dtype)
    assert num_bytes * 2 == plain_bytes
    assert abs(num_blocks - 2 * plain_blocks) <= 2


def test_other_types_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache.*dtype.*'float8_e4m3fn' or 'int8'"):
        LLM("demo", device="cpu", kv_cache={"dtype": "fp8_e5m2"})


def test_the_scales_of_int8_are_the_same_each_time(checkpoint: Callable[[str], Checkpoint]) -> None:
    folder = checkpoint("llama-2").folder
    one, other = (logprobs(folder, kv_cache={"dtype": "int8"}) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("name", ["gpt2 (bridge)", "gpt-oss (bridge)"])
def test_models_of_the_bridge(name: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    folder = checkpoint(name).folder
    plain = logprobs(folder)
    for dtype in ("fp8", "int8"):
        assert 1e-5 < distance(logprobs(folder, kv_cache={"dtype": dtype}), plain) < 0.3


@pytest.mark.parametrize("attention", ["attention-cpu", "torch-reference"])
@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_blocks_go_to_host_memory_and_back(
    dtype: str, attention: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    """Prompts that do not fit together, asked again: what is cached in host memory gives the tokens
    that it gave at first."""
    prompts = [[(7 * i + j) % 200 + 3 for j in range(96)] for i in range(6)]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "attention": attention,
        "scheduler": {"max_num_seqs": 1},
    }
    folder = checkpoint("llama-3.1").folder
    with LLM(folder, **settings, kv_cache={"dtype": dtype, "block_size": 16}) as llm:
        memory = 10 * llm.engine.kv.groups[0].bytes_per_block / 2**30
    cache = {"use": "hash", "host_memory_gb": 20 * memory}
    kv_cache = {"dtype": dtype, "block_size": 16, "memory_gb": memory}
    with LLM(folder, **settings, kv_cache=kv_cache, prefix_cache=cache) as llm:
        first, second = (llm.generate(prompts, params) for _ in range(2))
        assert [o.token_ids for o in first] == [o.token_ids for o in second]
        assert {o.num_cached_tokens for o in second} == {80}
        assert llm.engine.snapshot().num_prefix_evicted_blocks["to_host"] > 0
