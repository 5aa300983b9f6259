"""What a config.json says about attention, in the words of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import CheckpointError
from dovetail.facts import LayerKind, model_facts, window_of_layers

W = 8
QWEN = {"num_hidden_layers": 3, "sliding_window": W, "model_type": "qwen3"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"num_hidden_layers": 2}, [None, None]),
        ({"num_hidden_layers": 2, "sliding_window": None}, [None, None]),
        ({"num_hidden_layers": 2, "sliding_window": W}, [W, W]),  # Phi-3
        (
            {
                "num_hidden_layers": 2,
                "sliding_window": W,
                "model_type": "mistral",
                "use_sliding_window": False,
            },
            [W, W],
        ),
        ({"num_hidden_layers": 2, "model_type": "mistral"}, [4096, 4096]),
        ({"num_hidden_layers": 2, "model_type": "mistral", "sliding_window": None}, [None, None]),
        ({"num_hidden_layers": 2, "model_type": "llama", "sliding_window": W}, [None, None]),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": W}, [W, None]),
        # Qwen2, Qwen3
        (QWEN | {"use_sliding_window": True, "max_window_layers": 1}, [None, W, W]),
        (QWEN | {"use_sliding_window": True, "num_hidden_layers": 29}, [None] * 28 + [W]),
        (QWEN | {"use_sliding_window": False, "max_window_layers": 1}, [None] * 3),
        (QWEN | {"max_window_layers": 1}, [None] * 3),
        (QWEN, [None] * 3),
        # Gemma 2 and 3, Command R7B, from before layer_types
        ({"num_hidden_layers": 3, "sliding_window": W, "model_type": "gemma2"}, [W, None, W]),
        (
            {"num_hidden_layers": 7, "sliding_window": W, "model_type": "gemma3_text"},
            [W, W, W, W, W, None, W],
        ),
        (
            {"num_hidden_layers": 4, "sliding_window": W, "sliding_window_pattern": 3},
            [W, W, None, W],
        ),
    ],
)
def test_windows(config: dict[str, Any], windows: list[int | None]) -> None:
    assert window_of_layers(config) == windows


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 32),
        ({"rope_scaling": YARN}, 128),  # as Qwen documents it
        ({"rope_parameters": YARN}, 128),
        ({"rope_scaling": YARN, "max_position_embeddings": 128}, 128),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, 64),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 32),
    ],
)
def test_yarn_stretches_the_context(changes: dict[str, Any], length: int, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 32} | changes)
    )
    assert model_facts(tmp_path).max_position_embeddings == length


def test_the_words_of_gpt2(tmp_path: Path) -> None:
    config = {
        "architectures": ["GPTBigCodeForCausalLM"],
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 32,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"vocab_size": 100, "multi_query": True})
    )
    facts = model_facts(tmp_path)
    assert (facts.num_layers, facts.hidden_size, facts.max_position_embeddings) == (3, 64, 32)
    assert (facts.num_heads, facts.num_kv_heads, facts.head_size) == (4, 1, 16)
    assert facts.layer_kinds == (LayerKind("full", None),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "recursion"),
        (
            '{"num_hidden_layers": 1000000000, "vocab_size": 5, "hidden_size": 4, "n_head": 1}',
            "layers is above",
        ),
        (
            '{"vocab_size": 1%s, "hidden_size": 4, "num_attention_heads": 1, "n_layer": 1}'
            % ("0" * 400),
            "vocab_size is above",
        ),
        ('{"text_config": [1]}', "text_config must be an object"),
    ],
    ids=["deep", "a billion layers", "a huge number", "no object"],
)
def test_a_config_that_means_no_good_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        model_facts(tmp_path)
