"""Tiny models of the decoder's families, as contents of config.json: what conformance is tried
with."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True, "head_dim": 12},
    "Mistral": {"sliding_window": 7, "head_dim": 12},
    "Qwen2": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "head_dim": 12,
    },
    "Qwen3": {"head_dim": 16, "use_sliding_window": False},
}
TINY_CONFIGS = tuple(
    {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), **TINY, **changes}
    for name, changes in FAMILIES.items()
)
