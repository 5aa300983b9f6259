"""Random-weight models of real shape for benchmarks: made once, in a cache folder.

a: the shape of Qwen3-0.6B; b: of Llama-3.2-1B; c: tiny (8 layers of 256). Models of the bridge: d:
the shape of Pythia-160M; e: a small Gemma 2.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

GROUP = 128
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dovetail" / "bench-models"

SHAPES = {
    "a": (
        "Qwen3",
        "Qwen3-0.6B shape",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "theta": 1e6,
        },
    ),
    "b": (
        "Llama",
        "Llama-3.2-1B shape",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "theta": 5e5,
        },
    ),
    "c": (
        "Llama",
        "tiny (8 × 256)",
        {
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "theta": 1e4,
        },
    ),
    "d": (
        "GPTNeoX",
        "Pythia-160M shape",
        {
            "vocab_size": 50304,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "layer_norm_eps": 1e-5,
            "rotary_pct": 0.25,
            "theta": 1e4,
        },
    ),
    "e": (
        "Gemma2",
        "Gemma 2, 18 × 640",
        {
            "vocab_size": 65536,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "rms_norm_eps": 1e-6,
            "sliding_window": 512,
            "theta": 1e4,
        },
    ),
}


def folder_of(key: str) -> Path:
    """The model's folder, made at first use (bf16, with the demo model's tokenizer)."""
    folder = CACHE / key
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    import transformers

    from dovetail_demo_model import WEIGHTS

    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
    ):  # 4,096 entries: every prompt and every answer of c is text
        shutil.copy(WEIGHTS / name, folder)
    architecture, _, shape = SHAPES[key]
    shape = dict(shape)
    theta = shape.pop("theta")
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        **shape,
        max_position_embeddings=8192,
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return folder


def gptq_folder_of(key: str) -> Path:
    """The same shape with random 4-bit weights in groups of 128, as GPTQ stores them; its embedding
    is the model's own."""
    folder, plain = CACHE / f"{key}-gptq", folder_of(key)
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for path in plain.glob("*.json"):
        shutil.copy(path, folder)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        layer, (outs, ins) = name.removesuffix(".weight"), tensor.shape
        tensors[f"{layer}.qweight"] = torch.randint(-(2**31), 2**31, (ins // 8, outs)).to(
            torch.int32
        )
        tensors[f"{layer}.qzeros"] = torch.full(
            (-(-ins // GROUP), outs // 8), 0x77777777, dtype=torch.int32
        )  # 8, less one
        tensors[f"{layer}.scales"] = torch.full(
            (-(-ins // GROUP), outs), 0.02 / 4.6, dtype=torch.float16
        )
        tensors[f"{layer}.g_idx"] = (torch.arange(ins) // GROUP).to(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids, none of them special."""
    rng = random.Random(seed)
    return [rng.randrange(300, 4000) for _ in range(length)]
