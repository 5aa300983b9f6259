"""Every field of a config.json that changes what transformers computes is read, or refused by its
name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_models import load, make_checkpoint, run_ragged

from dovetail.errors import CheckpointError
from dovetail.facts import model_facts

LEFT_OUT = object()
SIZE = {"head_dim": 16}
ARCHITECTURES = {"Llama": SIZE, "Mistral": SIZE | {"sliding_window": 9}, "Qwen2": {}, "Qwen3": SIZE}
FULL, SLIDING = "full_attention", "sliding_attention"
CHANGES: dict[str, tuple[Any, ...]] = {
    "sliding_window": (7, None, 4096, LEFT_OUT),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 5),
    "layer_types": (
        [FULL, SLIDING],
        [SLIDING, FULL],
        [FULL, FULL],
        None,
        LEFT_OUT,
        ["linear_attention"] * 2,
    ),
    "attention_bias": (True, False),
    "mlp_bias": (True,),
    "rope_theta": (500.0,),
    "partial_rotary_factor": (0.5,),
    "hidden_act": ("gelu", "relu", "swish", "mish"),
    "rms_norm_eps": (0.1, LEFT_OUT),
    "tie_word_embeddings": (True, LEFT_OUT),
    "head_dim": (LEFT_OUT,),
    "num_key_value_heads": (2,),
    "is_causal": (True, False),
    "max_position_embeddings": (64, 32, LEFT_OUT),
    "original_max_position_embeddings": (64,),
    "rope_parameters": (
        None,
        LEFT_OUT,
        {"rope_type": "default", "rope_theta": 77.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5},
        {"rope_type": "proportional"},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "factor": 2.0,
        },
    ),
    "rope_scaling": (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 4.0},
    ),
    # Of other families: transformers does not look at them here, and neither do we.
    "pretraining_tp": (2,),
    "logits_scaling": (3.0,),
    "attention_multiplier": (0.3,),
    "attn_logit_softcapping": (2.0,),
    "final_logit_softcapping": (2.0,),
    "use_qk_norm": (True,),
    "query_pre_attn_scalar": (3,),
    "residual_multiplier": (0.5,),
    "attention_dropout": (0.5,),
    "no_rope_layers": ([0, 1],),
    "clip_qkv": (1.0,),
    "norm_eps": (0.3,),
}
"""By field: values to try, in place of what is there."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fields_are_read_or_refused(architecture: str, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed)
    make_checkpoint(tmp_path, architecture, ARCHITECTURES[architecture])
    path = tmp_path / "config.json"
    plain, compared = json.loads(path.read_text()), 0
    for field, values in CHANGES.items():
        for value in values:
            config = {name: held for name, held in plain.items() if name != field}
            if value is not LEFT_OUT:
                config[field] = value
            if field in ("rope_scaling", "rope_theta"):  # as before transformers 5
                config.pop("rope_parameters", None)
            if field in ("sliding_window", "use_sliding_window", "max_window_layers"):
                for derived in {"layer_types", "use_sliding_window", "max_window_layers"} - {field}:
                    config.pop(derived, None)
                if field != "sliding_window":
                    config |= {
                        "sliding_window": 7,
                        "use_sliding_window": value if field == "use_sliding_window" else True,
                    }
            path.write_text(json.dumps(config))
            compared += check(tmp_path, f"seed {seed}, {field} = {config.get(field, 'left out')!r}")
    assert compared > 30


def check(folder: Path, what: str) -> bool:
    """Whether both computed something, which must be the same."""
    prompt = [random.randrange(203) for _ in range(26)]
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        with torch.inference_mode():
            expected = theirs.eval()(torch.tensor([prompt]), use_cache=False).logits[0]
    except Exception:
        expected = None  # a config that transformers does not take may be taken here
    try:
        windows = {kind.window for kind in model_facts(folder).layer_kinds}
        model = load(folder, torch.float32, "plain")
        (ours,) = run_ragged(model, [prompt])
    except CheckpointError as refusal:
        if "config" not in refusal.message:
            pytest.fail(f"{what}: {refusal.message}")
        return False
    assert windows == {layer.window for layer in model.attention_layers}, what
    if expected is None:
        return False
    error = float((ours - expected).abs().max() / expected.abs().max())
    assert error < 1e-4, f"{what}: differs by {error:.2e}"
    return True
