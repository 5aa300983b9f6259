"""Fixtures for tests across packages: small random-weight checkpoints made by transformers."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA4 = {
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 9,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 203,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {"num_key_value_heads": 4}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 48}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "gpt2 (bridge)": ("GPT2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gemma2 (bridge)": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 9, "query_pre_attn_scalar": 24},
    ),
    "gemma4 (bridge)": ("Gemma4", GEMMA4),
    "gpt-oss (bridge)": (
        "GptOss",
        {"head_dim": 32, "sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
MARGIN = 1e-4
"""Numerical sameness speaks of steps whose two best logits differ by more than this."""


@dataclass
class Checkpoint:
    folder: Path
    model: Any

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """What transformers' generate gives, up to the first step that is too close to call."""
        out = self.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=num_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens = out.sequences[0, len(prompt) :].tolist()
        for i, logits in enumerate(out.logits):
            best, second = logits[0].float().topk(2).values.tolist()
            if best - second <= MARGIN:
                return tokens[:i]
        return tokens


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Make (once a session) a float32 checkpoint of an architecture with fresh random weights."""
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            import transformers

            seed = random.randrange(2**31)
            print(f"{name}: weights from seed {seed}")
            torch.manual_seed(seed)
            architecture, changes = ARCHITECTURES[name]
            head = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
            cls = getattr(transformers, architecture + head)
            model = cls(cls.config_class(**{**SIZES, **changes})).eval()
            for (
                parameter
            ) in model.parameters():  # spread the logits: freshly made ones are nearly equal
                if parameter.dim() > 1:
                    parameter.data *= 4
            folder = tmp_path_factory.mktemp("checkpoint")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.save_pretrained(folder)
            made[name] = Checkpoint(folder, model)
        return made[name]

    return make
