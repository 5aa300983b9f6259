"""Models of real shape from a config.json alone, and engines of them with random weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rows import DEVICE, DRY

from dovetail.assembly.compose import build_engine
from dovetail.composition.resolution import resolve
from dovetail.engine.engine import Engine
from dovetail.plugin.config import EngineConfig

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "eos_token_id": 2,
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
SMALL = TINY | {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "head_dim": 64,
}
"""Of sizes that all kernels take."""
CONFIG = TINY if DRY else LLAMA_8B


def folder(config: dict[str, Any]) -> Path:
    path = Path(tempfile.mkdtemp(prefix="dovetail-gpu-"))
    (path / "config.json").write_text(json.dumps(config))
    return path


def checkpoint(config: dict[str, Any]) -> Path:
    """A Llama's checkpoint of random weights that are large enough for its tokens to depend on all
    that came before."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)

    def normal(rows: int, columns: int, spread: float = 1.5) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * spread / columns**0.5

    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    tensors = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": normal(config["vocab_size"], hidden, 3.0),
    }
    for i in range(config["num_hidden_layers"]):
        for name, rows, columns in (
            ("self_attn.q_proj", query, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, query),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            tensors[f"model.layers.{i}.{name}.weight"] = normal(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden)
    path = folder(config)
    save_file(tensors, path / "model.safetensors")
    return path


def weight_bytes() -> int:
    """Bytes of weights that a decode step reads: all but the embedding, of which it reads a row a
    sequence."""
    c = CONFIG
    heads = (c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * c["head_dim"]
    layer = c["hidden_size"] * (
        heads + c["num_attention_heads"] * c["head_dim"] + 3 * c["intermediate_size"]
    )
    return 2 * (c["num_hidden_layers"] * layer + c["vocab_size"] * c["hidden_size"])


def kv_bytes(num_tokens: int) -> int:
    return (
        num_tokens
        * CONFIG["num_hidden_layers"]
        * 2
        * CONFIG["num_key_value_heads"]
        * CONFIG["head_dim"]
        * 2
    )


def engine(
    max_num_seqs: int,
    max_model_len: int,
    *,
    model: Path | None = None,
    progress: Any = lambda *_: None,
    worker: dict[str, Any] | None = None,
    max_num_batched_tokens: int = 8192,
    **more: Any,
) -> Engine:
    """The overlapped engine, without a front-end, of a checkpoint or of CONFIG's shape with weights
    that the worker makes up. `more` are entries of its engine config."""
    weights = "random" if model is None else "checkpoint"
    chosen = {
        "model": str(model or folder(CONFIG)),
        "device": DEVICE,
        "dtype": "bfloat16",
        "max_model_len": max_model_len,
        "prefix_cache": "none",
        "worker": {"use": "torch", "weights": weights, **(worker or {})},
        "overlap": True,
        "scheduler": {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": 64 if DRY else max_num_batched_tokens,
        },
        **more,
    }
    if DRY:  # nothing that is compiled for this CPU first
        chosen["kv_cache"] = {**chosen.get("kv_cache", {}), "memory_gb": 0.05}
        chosen["worker"]["execution"] = "plain"
        chosen["attention"] = "torch-reference"
    return build_engine(resolve(EngineConfig.model_validate(chosen)), progress)
