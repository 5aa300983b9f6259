"""A quantized model takes the memory that its format promises from the checkpoint's headers:
measured in processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_memory import in_a_process
from safetensors.torch import save_file
from torch import Tensor

from dovetail.facts import device_facts
from dovetail.plugin.provider import why_not_built
from dovetail_matmul_cpu import NEEDED_FLAGS

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
ONE = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 1}
"""What does not grow with the layers, such as the buffers of a step, is in both of these."""
MORE = ONE | {"num_hidden_layers": 5}
HEADS, HEAD_SIZE, VOCAB, GROUP = 8, 64, 4096, 128
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}


def gptq(outs: int, ins: int) -> dict[str, Tensor]:
    return {
        "qweight": torch.full((ins // 8, outs), 0x12345678, dtype=torch.int32),
        "qzeros": torch.full((ins // GROUP, outs // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.full((ins // GROUP, outs), 0.001, dtype=torch.float16),
        "g_idx": (torch.arange(ins) // GROUP).int(),
    }


def checkpoint(folder: Path, sizes: dict[str, int], is_gptq: bool) -> Path:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_SIZE,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        **sizes,
    }
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], HEADS * HEAD_SIZE
    shapes = dict.fromkeys(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (heads, hidden)
    )
    shapes |= {"self_attn.o_proj": (hidden, heads), "mlp.down_proj": (hidden, inner)}
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, hidden))
    tensors = {
        "model.embed_tokens.weight": torch.full((VOCAB, hidden), 0.01),
        "model.norm.weight": torch.ones(hidden),
    }
    for i in range(sizes["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = torch.ones(hidden)
        for name, (outs, ins) in shapes.items():
            stored = (
                gptq(outs, ins)
                if is_gptq
                else {"weight": torch.full((outs, ins), 0.01, dtype=torch.bfloat16)}
            )
            tensors |= {f"{at}.{name}.{key}": tensor for key, tensor in stored.items()}
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(config | ({"quantization_config": GPTQ} if is_gptq else {}))
    )
    save_file(
        {n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.mark.skipif(
    bool(why_not_built(device_facts(), NEEDED_FLAGS)),
    reason="torch's reference, which runs here instead of the kernels, leaves what it dequantizes"
    " in the allocator",
)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "gptq"])
def test_it_takes_what_the_format_promises(scheme: str, tmp_path: Path) -> None:
    tiny, one, more = (
        checkpoint(tmp_path / str(i), sizes, scheme == "gptq")
        for i, sizes in enumerate((TINY, ONE, MORE))
    )
    less, all_of_it = in_a_process(tiny, one, scheme), in_a_process(tiny, more, scheme)
    promised = all_of_it["promised"] - less["promised"]
    assert promised > 50e6
    assert abs((all_of_it["resident"] - less["resident"]) / promised - 1) < 0.05, (less, all_of_it)
