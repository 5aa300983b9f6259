"""Models of real shape from a config.json alone, and engines of them with random weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rows import DEVICE, DRY

from dovetail.compose import build_engine
from dovetail.config import EngineConfig
from dovetail.engine import Engine
from dovetail.resolution import resolve

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "eos_token_id": 2,
}  # fmt: skip
TINY = LLAMA_8B | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
}  # fmt: skip
CONFIG = TINY if DRY else LLAMA_8B


def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="dovetail-gpu-"))
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def weight_bytes() -> int:
    """That a decode step reads: all but the embedding, of which it reads a row a sequence."""
    c = CONFIG
    heads = (c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * c["head_dim"]
    layer = c["hidden_size"] * (heads + c["num_attention_heads"] * c["head_dim"] + 3 * c["intermediate_size"])
    return 2 * (c["num_hidden_layers"] * layer + c["vocab_size"] * c["hidden_size"])


def kv_bytes(num_tokens: int) -> int:
    return num_tokens * CONFIG["num_hidden_layers"] * 2 * CONFIG["num_key_value_heads"] * CONFIG["head_dim"] * 2


def engine(max_num_seqs: int, max_model_len: int, **more: Any) -> Engine:
    """The overlapped engine, as `device: cuda:0` composes it; nothing of a front-end."""
    config = {
        "model": str(folder()), "device": str(DEVICE), "dtype": "bfloat16", "max_model_len": max_model_len,
        "prefix_cache": "none", "worker": {"use": "torch", "weights": "random"}, "overlap": True,
        "scheduler": {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": 64 if DRY else 8192}, **more,
    }  # fmt: skip
    if DRY:
        config["kv_cache"] = {"memory_gb": 0.05}
    return build_engine(resolve(EngineConfig.model_validate(config)), lambda *_: None)
