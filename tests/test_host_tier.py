"""KV blocks in host memory, in real engines: the same tokens, whichever tier they come from."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.composition.resolution import resolve
from dovetail.errors import ConfigError, OutOfMemory
from dovetail.plugin.config import load_config
from dovetail.runtime.llm import LLM
from dovetail.types import SamplingParams

# Room for two of the prompts below on the device, and for all in host memory.
TIGHT: dict[str, Any] = {
    "model": "demo",
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 256,
    "kv_cache": {"use": "paged", "block_size": 16},
    "scheduler": {"use": "fcfs", "max_num_seqs": 2},
}
TEXT = (
    "import os\nimport sys\n\n\ndef main(argv):\n    for name in argv:\n        print(name,"
    " len(name))\n    return 0\n\n\n"
)


def prompts(llm: LLM) -> list[list[int]]:
    assert llm.tokenizer is not None
    tokens = llm.tokenizer.encode(TEXT * 8, add_special_tokens=False)[:120]
    return [[*tokens[i:], *tokens[:i]] for i in range(0, 120, 20)]


def small(llm: LLM) -> float:
    """GiB in which two sequences of full length fit."""
    group = llm.engine.kv.groups[0]
    return 2 * (256 // 16 + 1) * group.bytes_per_block / 2**30


@pytest.mark.parametrize("attention", ["auto", "torch-reference"])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_same_tokens_from_either_tier(attention: str, overlap: bool) -> None:
    params = [SamplingParams(max_tokens=20, temperature=0.8 * (i % 2), seed=i) for i in range(6)]
    with LLM(**TIGHT, prefix_cache="none", attention=attention) as llm:
        asked, memory = prompts(llm), small(llm)
        expected = [o.token_ids for o in llm.generate(asked, params)]
    cache = {"use": "hash", "eviction": "lru", "host_memory_gb": 20 * memory}
    settings = {**TIGHT, "kv_cache": {"use": "paged", "block_size": 16, "memory_gb": memory}}
    with LLM(**settings, prefix_cache=cache, attention=attention, overlap=overlap) as llm:
        for i in range(3):
            answers = llm.generate(asked, params)
            assert [o.token_ids for o in answers] == expected
            assert {o.num_cached_tokens for o in answers} == {112 if i else 0}
        stats = llm.engine.snapshot()
        assert stats.num_prefix_evicted_blocks["to_host"] > 0
        assert (
            stats.num_prefix_evicted_blocks["device_full"]
            == stats.num_prefix_evicted_blocks["host_full"]
            == 0
        )
        assert stats.num_prefix_blocks["host"] > 0
        llm.reset_prefix_cache()
        assert llm.engine.snapshot().num_prefix_blocks == {"device": 0, "host": 0}
        answers = llm.generate(asked, params)
        assert [o.token_ids for o in answers] == expected
        assert answers[0].num_cached_tokens == 0


def test_more_host_memory_than_there_is_is_refused() -> None:
    cache = {"use": "hash", "host_memory_gb": 1e6}
    with pytest.raises(
        ConfigError, match=r"host_memory_gb: 1e[+]06 GiB is more than this machine has"
    ):
        resolve(load_config(**TIGHT, prefix_cache=cache))


@pytest.mark.parametrize("value", [-1, "much", float("nan")])
def test_host_memory_that_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="host_memory_gb"):
        resolve(load_config(**TIGHT, prefix_cache={"use": "hash", "host_memory_gb": value}))


def test_host_memory_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="hold less than one block per KV group; set at least"):
        LLM(**TIGHT, prefix_cache={"use": "hash", "host_memory_gb": 1e-9})


def test_a_cache_larger_than_memory_is_refused() -> None:
    huge = {"use": "paged", "memory_gb": 1e6}
    settings = {
        **TIGHT,
        "max_model_len": 2048,
        "kv_cache": huge,
        "scheduler": {"use": "fcfs", "max_num_seqs": 10_000_000},
    }
    with pytest.raises(OutOfMemory, match=r"the KV cache of [0-9]+ blocks could not be allocated"):
        LLM(**settings, prefix_cache="hash")
