"""Every architecture against transformers' own forward pass: ragged batches, prefill in chunks,
decode, in float32.

*Numerical equivalence*: logits at every position within 1e-4 of the largest. Weights, prompts and
chunks are random; the seed is printed.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dense
import pytest
import torch
from dense import CompiledModel, DenseAttention
from torch import Tensor

from dovetail.facts import model_facts
from dovetail.interfaces.architecture import Model
from dovetail_models_torch.rope import inverse_frequencies, rope_parameters

WINDOW = 7  # shorter than the longest sequence
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
SIZES: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 64,
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
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

# By name: the architecture of transformers, and what differs from SIZES.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {"num_key_value_heads": 4}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-3.2, tied": (
        "Llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 32},
    ),
    "llama, linear, biases": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama, dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral, full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3, sliding": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "attention_bias": True,
        },
    ),
}

MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
BRIDGED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 64,
            "num_key_value_heads": 4,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.5, "num_key_value_heads": 4}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 3, "layer_types": MIXED},
    ),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "qwen2-moe": ("Qwen2Moe", {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "olmo2": ("Olmo2", {}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "granite": (
        "Granite",
        {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    ),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "cohere2": ("Cohere2", {"sliding_window": WINDOW, "num_hidden_layers": 4}),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW}),
    "phi": ("Phi", {}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "olmo3": ("Olmo3", {"sliding_window": WINDOW, "num_hidden_layers": 4}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),  # every fourth layer without positions
    "qwen3-moe": ("Qwen3Moe", {**MOE, "head_dim": 16, "num_experts": 4}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "gpt-bigcode": (
        "GPTBigCode",
        {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "num_key_value_heads": 1},
    ),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": 4}),
}
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 203,
}
BRIDGED |= {
    "gemma4": ("Gemma4Text", {**GEMMA4, "num_kv_shared_layers": 0, "attention_k_eq_v": True}),
    "gemma4, shared keys": ("Gemma4Text", {**GEMMA4, "num_kv_shared_layers": 2}),
}
# torch.compile takes some ten seconds a family: one of them by default, all in the long runs.
TORCH_COMPILED = list(BRIDGED) if "DOVETAIL_SOAK" in os.environ else ["gpt-neox"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads of tiny operations wait for each other longer than they work, most of all on a busy
    machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seed() -> int:
    number = random.SystemRandom().randrange(2**31)
    print(f"seed {number}")
    torch.manual_seed(number)
    random.seed(number)
    return number


def load(folder: Path, dtype: torch.dtype, execution: str) -> Model:
    if execution == "compiled":
        return CompiledModel(folder, dtype)
    return dense.load(folder, dtype, torch_compile=execution == "torch.compile")


def run_ragged(model: Model, prompts: list[list[int]]) -> list[Tensor]:
    """Logits of every token of every prompt, in steps that give each sequence 0 to 6 tokens, in any
    order."""
    attention = DenseAttention(model.attention_layers)
    num_computed, logits = [0] * len(prompts), [[] for _ in prompts]
    with torch.inference_mode():
        while any(n < len(p) for n, p in zip(num_computed, prompts, strict=True)):
            left = [
                (i, len(p) - n)
                for i, (n, p) in enumerate(zip(num_computed, prompts, strict=True))
                if n < len(p)
            ]
            rows = [(i, min(room, random.choice([0, 1, 1, 3, 6]))) for i, room in left]
            attention.rows = [row for row in random.sample(rows, len(rows)) if row[1]]
            if not attention.rows:
                continue
            spans = [
                (i, range(num_computed[i], num_computed[i] + count)) for i, count in attention.rows
            ]
            token_ids = torch.tensor([prompts[i][p] for i, span in spans for p in span])
            positions = torch.tensor([p for _, span in spans for p in span])
            hidden = model.forward(token_ids, positions, attention)
            step = model.logits(hidden).split([count for _, count in attention.rows])
            for (i, count), part in zip(attention.rows, step, strict=True):
                logits[i].append(part)
                num_computed[i] += count
    return [torch.cat(parts) for parts in logits]


def make_checkpoint(
    folder: Path, architecture: str, changes: dict[str, Any], dtype: torch.dtype = torch.float32
) -> Any:
    """Save a model of random weights, none of them at a neutral value; return transformers' own
    model."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        **{**SIZES, **changes}, attn_implementation="eager"
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    model.to(dtype).save_pretrained(folder)
    return model


def check_same(folder: Path, reference: Any, execution: str = "plain") -> Model:
    """Load the folder and compare; return our model."""
    model = load(folder, torch.float32, execution)
    assert model.vocab_size == reference.config.vocab_size
    prompts = [
        [random.randrange(model.vocab_size) for _ in range(length)] for length in (1, 9, 26, 17)
    ]
    for ours, prompt in zip(run_ragged(model, prompts), prompts, strict=True):
        with torch.inference_mode():
            theirs = reference(torch.tensor([prompt]), use_cache=False).logits[0]
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-4, f"{error:.2e} at {len(prompt)} tokens"
    facts = model_facts(folder)
    assert facts.num_layers == len(model.attention_layers)
    assert {kind.window for kind in facts.layer_kinds} == {
        layer.window for layer in model.attention_layers
    }
    layer = model.attention_layers[0]
    assert (facts.num_heads, facts.num_kv_heads, facts.head_size) == (
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_size,
    )
    assert facts.logit_soft_cap == layer.logit_soft_cap
    assert facts.has_sinks == (layer.sinks is not None)
    return model


@pytest.mark.parametrize("execution", ["plain", "compiled"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_the_same_as_transformers(
    name: str, execution: str, tmp_path: Path, seed: int
) -> None:
    architecture, changes = DECODERS[name]
    reference = make_checkpoint(tmp_path, architecture, changes)
    model = check_same(tmp_path, reference, execution)
    if "sliding" in name or name == "mistral":
        assert WINDOW in {layer.window for layer in model.attention_layers}


@pytest.mark.parametrize("name", BRIDGED)
def test_bridged_is_the_same_as_transformers(name: str, tmp_path: Path, seed: int) -> None:
    architecture, changes = BRIDGED[name]
    reference = make_checkpoint(tmp_path, architecture, changes)
    check_same(tmp_path, reference)


@pytest.mark.parametrize("name", TORCH_COMPILED)
def test_bridged_through_torch_compile_is_the_same_as_transformers(
    name: str, tmp_path: Path, seed: int
) -> None:
    architecture, changes = BRIDGED[name]
    check_same(tmp_path, make_checkpoint(tmp_path, architecture, changes), "torch.compile")


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "cohere2"])
def test_windows_are_known_from_configs_without_layer_types(
    name: str, tmp_path: Path, seed: int
) -> None:
    architecture, changes = BRIDGED[name]
    changes = {key: value for key, value in changes.items() if key != "layer_types"} | {
        "num_hidden_layers": 7
    }
    reference = make_checkpoint(tmp_path, architecture, changes)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"]
    path.write_text(json.dumps(config))
    check_same(tmp_path, reference)


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_pytorch_tanh"])
def test_a_compiled_decoder_activates_as_transformers_does(
    activation: str, tmp_path: Path, seed: int
) -> None:
    changes = {
        "hidden_act": activation,
        "hidden_size": 68,
        "head_dim": 16,
        "intermediate_size": 41,
        "vocab_size": 130,
    }
    check_same(tmp_path, make_checkpoint(tmp_path, "Llama", changes), "compiled")


@pytest.mark.parametrize("execution", ["plain", "compiled"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    execution: str, tmp_path: Path, seed: int
) -> None:
    reference = make_checkpoint(tmp_path, "Llama", {"rope_parameters": LLAMA3}, torch.bfloat16)
    prompt = [random.randrange(SIZES["vocab_size"]) for _ in range(20)]
    model = load(tmp_path, torch.bfloat16, execution)
    (ours,) = run_ragged(model, [prompt])
    with torch.inference_mode():
        theirs = reference(torch.tensor([prompt])).logits[0].float()
        exact = reference.float()(torch.tensor([prompt])).logits[0]
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


def test_configs_of_older_transformers_say_the_same(tmp_path: Path, seed: int) -> None:
    """`rope_theta` and `rope_scaling` with `type`, no `head_dim`."""
    reference = make_checkpoint(tmp_path, "Llama", {"rope_parameters": LLAMA3})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    config.pop("head_dim")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    path.write_text(json.dumps(config))
    check_same(tmp_path, reference)


@pytest.mark.parametrize(
    "rope_type", ["default", "linear", "llama3", "yarn", "yarn, mscale", "yarn, no truncation"]
)
def test_inverse_frequencies_are_those_of_transformers(rope_type: str, seed: int) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": rope_type.partition(",")[0],
        "rope_theta": 10 ** random.uniform(2, 6),
    }
    if rope_type != "default":
        parameters |= {"factor": random.uniform(1.5, 40)}
    if rope_type == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": random.uniform(2, 8)}
    if rope_type.startswith("yarn"):
        parameters |= {"beta_fast": random.uniform(16, 40), "beta_slow": random.uniform(0.5, 4)}
        parameters |= {"mscale": 0.7, "mscale_all_dim": 1.2} if "mscale" in rope_type else {}
        parameters |= {"truncate": False} if "no" in rope_type else {}
    if rope_type not in ("default", "linear"):
        parameters["original_max_position_embeddings"] = 512
    size = random.choice([16, 64, 128])
    config = {"max_position_embeddings": 4096, "rope_parameters": parameters}
    theirs = transformers.LlamaConfig(**config, head_dim=size)
    if rope_type == "default":
        expected, scale = (
            transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(
                theirs
            )
        )
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs)
    inv_freq, our_scale = inverse_frequencies(rope_parameters(config), size, 4096)
    assert our_scale == pytest.approx(scale)
    torch.testing.assert_close(inv_freq, expected, rtol=1e-5, atol=0)


def test_text_of_a_multimodal_model(tmp_path: Path, seed: int) -> None:
    text = {
        **SIZES,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "num_hidden_layers": 3,
        "layer_types": MIXED,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    parts = {"text_config": text, "vision_config": {**vision, "image_size": 8, "patch_size": 4}}
    ids = {"image_token_index": 203, "boi_token_index": 204, "eoi_token_index": 205}
    check_same(
        tmp_path, make_checkpoint(tmp_path, "Gemma3", {**parts, **ids, "mm_tokens_per_image": 4})
    )


def test_engines_in_threads_do_not_meet(tmp_path: Path, seed: int) -> None:
    """Two bridged models of different sizes, a step of each waiting in the middle for one of the
    other's."""
    references, models = [], []
    for name, layers in (("gpt-neox", 2), ("gemma2", 3)):
        architecture, changes = BRIDGED[name]
        references.append(
            make_checkpoint(tmp_path / name, architecture, {**changes, "num_hidden_layers": layers})
        )
        models.append(dense.load(tmp_path / name))
    prompt = [random.randrange(SIZES["vocab_size"]) for _ in range(12)]
    barrier = threading.Barrier(2)

    def run(model: Model) -> Tensor:
        attention = DenseAttention(model.attention_layers)
        attention.rows = [(0, len(prompt))]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if index < 2:
                barrier.wait(timeout=60)
            return attention(index, q, k, v)

        with torch.inference_mode():
            return model.logits(
                model.forward(torch.tensor(prompt), torch.arange(len(prompt)), attend)
            )

    with ThreadPoolExecutor(2) as threads:
        for ours, reference in zip(threads.map(run, models), references, strict=True):
            theirs = reference(torch.tensor([prompt]), use_cache=False).logits[0]
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
