"""KV caches of one byte in engines: near to the plain one, half as large, with scales from the checkpoint or from the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Checkpoint
from safetensors.torch import load_file, save_file

from dovetail import LLM, SamplingParams
from dovetail.errors import ConfigError

NUM_LOGPROBS = 10
PROMPT = [5, 80, 33, 7, 100, 4, 61, 9, 150, 12, 13, 40] * 3


def logprobs(folder: Path | str, prompt: Any = PROMPT, max_len: int = 128, **values: Any) -> list[dict[int, float]]:
    """At each position, chunk by chunk, so that the cache is read."""
    scheduler = {"max_num_batched_tokens": 7}
    with LLM(folder, dtype="float32", device="cpu", scheduler=scheduler, max_model_len=max_len, **values) as llm:
        params = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=NUM_LOGPROBS, logprobs=NUM_LOGPROBS, ignore_eos=True)
        (out,) = llm.generate([prompt], params)
        assert out.prompt_logprobs
        assert out.logprobs
        return [*(position for position in out.prompt_logprobs if position), *out.logprobs[:1]]


def distance(ours: list[dict[int, float]], theirs: list[dict[int, float]]) -> float:
    """Mean, over positions, of the largest difference."""
    assert len(ours) == len(theirs)
    return sum(max(abs(a[t] - b[t]) for t in a.keys() & b.keys()) for a, b in zip(ours, theirs, strict=True)) / len(ours)


@pytest.mark.parametrize("attention", ["attention-cpu", "torch-reference"])
@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_one_byte_is_near_the_plain_cache(dtype: str, attention: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    folder = checkpoint("llama-3.1").folder
    plain = logprobs(folder, attention=attention)
    found = distance(logprobs(folder, attention=attention, kv_cache={"dtype": dtype}), plain)
    print(dtype, attention, found)
    assert 1e-5 < found < 0.3


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_both_attentions_hold_the_same(dtype: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    folder = checkpoint("qwen2").folder  # biases, windows
    ours, theirs = (logprobs(folder, attention=name, kv_cache={"dtype": dtype}) for name in ("attention-cpu", "torch-reference"))
    assert distance(ours, theirs) < 0.05
