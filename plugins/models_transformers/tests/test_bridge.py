"""What the bridge refuses, and that it says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense import load
from safetensors.torch import load_file, save_file

from dovetail.errors import CheckpointError
from dovetail_models_transformers.versions import TESTED_TRANSFORMERS

SIZES: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}
# By name: the class of transformers, what differs from SIZES, and the reason that must be given.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 64},
        "T5For.* is an encoder-decoder",
    ),
    "bert": (
        "BertForMaskedLM",
        {},
        "BertForMaskedLM is not a causal language model .* it is BertLMHeadModel",
    ),
    "mamba": ("MambaForCausalLM", {"state_size": 8}, "has layers of kind linear_attention"),
    "llama4": (
        "Llama4ForCausalLM",
        {"intermediate_size_mlp": 64, "num_local_experts": 2},
        "layers of kind chunked_attention",
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {**MLA, "num_key_value_heads": 4, "first_k_dense_replace": 9},
        r"\(MLA\)",
    ),
    "falcon": (
        "FalconForCausalLM",
        {},
        "FalconForCausalLM chooses its attention from a fixed list",
    ),
    "bloom": ("BloomForCausalLM", {}, "cannot run on the engine's attention|from a fixed list"),
    "phi3-long": (
        "Phi3ForCausalLM",
        {"original_max_position_embeddings": 64, "rope_parameters": LONG},
        "would depend on the other",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_bridged_says_why(name: str, tmp_path: Path) -> None:
    architecture, changes, reason = REFUSED[name]
    cls = getattr(transformers, architecture)
    cls(cls.config_class(**{**SIZES, **changes})).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=reason) as e:
        load(tmp_path)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize(
    "wrong", ["missing", "surplus", "shape", "truncated", "pickled", "unknown type", "remote code"]
)
def test_a_broken_folder_is_not_bridged(wrong: str, tmp_path: Path) -> None:
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)).save_pretrained(tmp_path)
    weights, path = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, config = load_file(weights), json.loads(path.read_text())
    name = "gpt_neox.layers.1.attention.dense.weight"
    message = {
        "missing": f"transformers lacks {name}",
        "surplus": "has no place for .*other",
        "shape": rf"{name} has shape \[3, 3\].* asks for \[64, 64\]",
    }.get(wrong, "")
    match wrong:
        case "missing":
            del tensors[name]
        case "surplus":
            tensors["gpt_neox.other"] = torch.zeros(1)
        case "shape":
            tensors[name] = torch.zeros(3, 3)
        case "unknown type":
            config |= {"model_type": "nothing-known", "architectures": ["NothingForCausalLM"]}
            message = "transformers cannot load it.*nothing-known"
        case "remote code":
            config |= {
                "model_type": "mine",
                "architectures": ["Mine"],
                "auto_map": {"AutoConfig": "mine.C"},
            }
            (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
            message = "trust_remote_code"
    save_file(tensors, weights, {"format": "pt"})
    path.write_text(json.dumps(config))
    if wrong == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        message = "model.safetensors is truncated"
    if wrong == "pickled":
        weights.rename(tmp_path / "pytorch_model.bin")
        message = "pickled weights only"
    with pytest.raises(CheckpointError, match=message) as e:
        load(tmp_path)
    assert str(tmp_path) in str(e.value)
    assert not (tmp_path / "ran").exists()


def test_a_head_that_needs_more_than_hidden_states_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)).save_pretrained(tmp_path)
    forward = transformers.GPTNeoXForCausalLM.forward

    def changed(self: Any, *arguments: Any, **named: Any) -> Any:
        output = forward(self, *arguments, **named)
        if hasattr(self.gpt_neox, "layers"):  # the whole model, not its head
            output.logits = output.logits + 1.0
        return output

    monkeypatch.setattr(transformers.GPTNeoXForCausalLM, "forward", changed)
    with pytest.raises(
        CheckpointError, match="needs more of the body's output than the hidden states"
    ):
        load(tmp_path)


def test_an_untried_version_of_transformers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)).save_pretrained(tmp_path)
    load(tmp_path)
    assert not caplog.records
    monkeypatch.setattr("dovetail_models_transformers.bridge.transformers.__version__", "5.99.0")
    load(tmp_path)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert (
        "transformers 5.99.0 was not tried with the bridge (tried:"
        f" {', '.join(TESTED_TRANSFORMERS)})" in record.message
    )
