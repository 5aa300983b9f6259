"""What a config.json says about attention, in the words of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.facts import LayerKind, model_facts, window_of_layers

W = 8


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"num_hidden_layers": 2}, [None, None]),
        ({"num_hidden_layers": 2, "sliding_window": None}, [None, None]),
        ({"num_hidden_layers": 2, "sliding_window": W}, [W, W]),  # Mistral, Phi-3
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": W}, [W, None]),
        # Qwen2, Qwen3
        ({"num_hidden_layers": 3, "sliding_window": W, "use_sliding_window": True, "max_window_layers": 1}, [None, W, W]),
        ({"num_hidden_layers": 2, "sliding_window": W, "use_sliding_window": False, "max_window_layers": 1}, [None, None]),
        ({"num_hidden_layers": 2, "sliding_window": W, "max_window_layers": 1}, [None, None]),
        # Gemma 2 and 3, Command R7B, from before layer_types
        ({"num_hidden_layers": 3, "sliding_window": W, "model_type": "gemma2"}, [W, None, W]),
        ({"num_hidden_layers": 7, "sliding_window": W, "model_type": "gemma3_text"}, [W, W, W, W, W, None, W]),
        ({"num_hidden_layers": 4, "sliding_window": W, "sliding_window_pattern": 3}, [W, W, None, W]),
    ],
)
def test_windows(config: dict[str, Any], windows: list[int | None]) -> None:
    assert window_of_layers(config) == windows


def test_the_words_of_gpt2(tmp_path: Path) -> None:
    config = {"architectures": ["GPTBigCodeForCausalLM"], "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 100, "multi_query": True}))
    facts = model_facts(tmp_path)
    assert (facts.num_layers, facts.hidden_size, facts.max_position_embeddings) == (3, 64, 32)
    assert (facts.num_heads, facts.num_kv_heads, facts.head_size) == (4, 1, 16)
    assert facts.layer_kinds == (LayerKind("full", None),)
