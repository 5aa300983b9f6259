"""Our own decoder keeps the contract that a stranger's model code keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail.testing.architecture import ArchitectureContract
from dovetail_worker_torch import dovetail_architectures

TINY: dict[str, Any] = {
    "vocab_size": 203, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True, "head_dim": 12},
    "Mistral": {"sliding_window": 7, "head_dim": 12},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "head_dim": 12},
    "Qwen3": {"head_dim": 16, "use_sliding_window": False},
}


class TestDecoder(ArchitectureContract):
    provider = dovetail_architectures()[0]
    configs = tuple(
        {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), **TINY, **changes}
        for name, changes in FAMILIES.items()
    )

    @staticmethod
    def reference_logits(config: dict[str, Any], tensors: dict[str, Tensor], token_ids: list[int]) -> Tensor:
        import transformers

        name = config["architectures"][0].removesuffix("ForCausalLM")
        settings = getattr(transformers, f"{name}Config")(**config)
        model = getattr(transformers, f"{name}ForCausalLM")(settings).eval()
        tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if config.get("tie_word_embeddings") else {}
        model.load_state_dict({**tensors, **tied})
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0]
