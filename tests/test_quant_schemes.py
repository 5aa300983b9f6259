"""fp8, int8 and bitsandbytes in engines: on the fly, from checkpoints, by rules; against plain
models of the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from dovetail import LLM, SamplingParams
from dovetail.errors import CheckpointError, ConfigError, PluginError
from dovetail.facts import device_facts
from dovetail.plugin.provider import why_not_built
from dovetail_worker_torch.execution import NEEDED_FLAGS

PROMPT = [5, 80, 33, 7, 100, 4, 61, 9, 150, 12, 13, 40]
NUM_LOGPROBS = 20


@pytest.fixture
def llama(checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    """Its layers have 128, 64 and 96 outputs: of blocks of 128, fused ones have parts that are
    none."""
    return checkpoint("llama-3.1")


def assert_logprobs(folder: Path, model: Any, limit: float, **values: Any) -> None:
    """The engine's log-probabilities of the most probable tokens, at each position, are within
    `limit` of the model's."""
    with LLM(folder, dtype="float32", device="cpu", **values) as llm:
        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=NUM_LOGPROBS, logprobs=NUM_LOGPROBS
        )
        (out,) = llm.generate([PROMPT], params)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    assert out.prompt_logprobs
    assert out.logprobs
    found = [*(position for position in out.prompt_logprobs if position), *out.logprobs]
    assert len(found) == len(PROMPT)
    worst = 0.0
    for position, row in zip(found, expected, strict=True):
        assert len(position) >= NUM_LOGPROBS
        worst = max(
            worst, *(abs(logprob - float(row[token])) for token, logprob in position.items())
        )
    assert worst <= limit, f"off by {worst:.3g}"


def by_channel(weight: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / largest
    codes = weight / scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype).float() * scale


def by_tensor(weight: Tensor) -> Tensor:
    return by_channel(weight.reshape(1, -1), 448, torch.float8_e4m3fn).view(weight.shape)


def by_block(weight: Tensor) -> Tensor:
    found = weight.clone()
    for i in range(0, weight.shape[0], 128):
        for j in range(0, weight.shape[1], 128):
            found[i : i + 128, j : j + 128] = by_tensor(weight[i : i + 128, j : j + 128])
    return found


def fp8(weight: Tensor) -> Tensor:
    return by_channel(weight, 448, torch.float8_e4m3fn)


def int8(weight: Tensor) -> Tensor:
    return by_channel(weight, 127, torch.int8)


def changed(source: Checkpoint, change: Callable[[str], Callable[[Tensor], Tensor] | None]) -> Any:
    """The model with other weights, by name of a layer."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source.folder)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and (new := change(name)):
            module.weight.data = new(module.weight.data)
    return model


ON_THE_FLY: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ({"use": "fp8", "activations": "none"}, fp8),
    ({"use": "fp8", "granularity": "tensor", "activations": "none"}, by_tensor),
    ({"use": "fp8", "granularity": "block"}, by_block),
    ({"use": "int8", "activations": "none"}, int8),
    ({"use": "bitsandbytes", "threshold": 1e-30}, int8),
]


@pytest.mark.parametrize("matmul", ["auto", "torch"])
@pytest.mark.parametrize(
    ("scheme", "weight"), ON_THE_FLY, ids=[str(list(s.values())) for s, _ in ON_THE_FLY]
)
def test_on_the_fly_is_the_plain_model_of_those_weights(
    scheme: Any, weight: Any, matmul: str, llama: Checkpoint
) -> None:
    limit = 5e-3 if scheme["use"] == "bitsandbytes" else 2e-4  # its inputs have 15 bits
    assert_logprobs(
        llama.folder, changed(llama, lambda name: weight), limit, quantization=scheme, matmul=matmul
    )


@pytest.mark.parametrize(
    ("scheme", "weight", "limit"),
    [("int8", int8, 0.2), ("fp8", fp8, 0.8), ("bitsandbytes", int8, 0.2)],
)
def test_rounded_inputs_are_near_the_plain_model(
    scheme: str, weight: Any, limit: float, llama: Checkpoint
) -> None:
    assert_logprobs(llama.folder, changed(llama, lambda name: weight), limit, quantization=scheme)


def test_rules_mix_schemes(llama: Checkpoint) -> None:
    rules = [
        {"match": "*.layers.0.mlp.*", "use": "int8", "activations": "none"},
        {"match": "*.self_attn.*", "use": "fp8", "granularity": "block"},
    ]

    def weight(name: str) -> Callable[[Tensor], Tensor] | None:
        return by_block if ".self_attn." in name else int8 if ".layers.0.mlp." in name else None

    assert_logprobs(llama.folder, changed(llama, weight), 2e-4, quantization=rules)


@pytest.mark.parametrize(
    "execution",
    [
        "plain",
        pytest.param(
            "compiled",
            marks=pytest.mark.skipif(
                bool(why_not_built(device_facts(), NEEDED_FLAGS)), reason="no compiled steps here"
            ),
        ),
    ],
)
def test_a_tied_output_projection_is_quantized_where_a_rule_names_it(
    execution: str, llama: Checkpoint, tmp_path: Path
) -> None:
    """The embedding, whose weight it shares, stays as it is."""
    tied = Checkpoint(shutil.copytree(llama.folder, tmp_path / "tied"), None)
    tensors = load_file(llama.folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied.folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((llama.folder / "config.json").read_text())
    (tied.folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    model = changed(tied, lambda name: int8)
    model.lm_head.weight = torch.nn.Parameter(int8(model.get_input_embeddings().weight.data))
    rules = [
        {"match": "lm_head", "use": "int8", "activations": "none"},
        {"match": "*", "use": "int8", "activations": "none"},
    ]
    assert_logprobs(
        tied.folder,
        model,
        2e-4,
        quantization=rules,
        worker={"use": "torch", "execution": execution},
    )


def stored(
    source: Checkpoint,
    folder: Path,
    config: dict[str, Any],
    pack: Callable[[Tensor], dict[str, Tensor]],
) -> Path:
    """A checkpoint of a method: `pack` gives a weight's tensors."""
    shutil.copytree(source.folder, folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source.folder / "model.safetensors").items():
        layer, _, kind = name.rpartition(".")
        is_plain = kind != "weight" or tensor.dim() != 2 or "embed" in name or layer == "lm_head"
        tensors |= (
            {name: tensor}
            if is_plain
            else {f"{layer}.{n}": t.contiguous() for n, t in pack(tensor).items()}
        )
    save_file(tensors, folder / "model.safetensors")
    settings = json.loads((source.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return folder


BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}


def pack_blocks(weight: Tensor) -> dict[str, Tensor]:
    scales = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            where = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[where].abs().max() / 448
            codes[where] = (weight[where] / scales[i, j]).to(codes.dtype)
    return {"weight": codes, "weight_scale_inv": scales}


def test_a_checkpoint_of_blocks(llama: Checkpoint, tmp_path: Path) -> None:
    folder = stored(llama, tmp_path / "fp8", BLOCKS, pack_blocks)
    assert_logprobs(folder, changed(llama, lambda name: by_block), 2e-4)


def test_a_checkpoint_of_blocks_says_how_it_is_read(llama: Checkpoint, tmp_path: Path) -> None:
    folder = stored(llama, tmp_path / "fp8", BLOCKS, pack_blocks)
    with pytest.raises(
        ConfigError, match=r"'channel' is requested, but the checkpoint has one scale per block"
    ):
        LLM(folder, device="cpu", quantization={"use": "fp8", "granularity": "channel"})
    with pytest.raises(PluginError, match=r"int8.*the checkpoint is quantized with fp8"):
        LLM(folder, device="cpu", quantization="int8")


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(
    "config",
    [{"weight_block_size": None}, {"ignored_layers": ["lm_head"]}],
    ids=["transformers", "AutoFP8"],
)
def test_checkpoints_of_one_scale(
    config: Any, shape: tuple[int, ...], llama: Checkpoint, tmp_path: Path
) -> None:
    names = (
        ("weight_scale_inv", "activation_scale")
        if "weight_block_size" in config
        else ("weight_scale", "input_scale")
    )

    def pack(weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().max() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, names[0]: scale.reshape(shape), names[1]: torch.full(shape, 0.02)}

    config = {"quant_method": "fp8", "activation_scheme": "static", **config}
    folder = stored(llama, tmp_path / "fp8", config, pack)
    model = changed(llama, lambda name: by_tensor)
    assert_logprobs(folder, model, 0.8)
    assert_logprobs(folder, model, 2e-4, quantization={"use": "fp8", "activations": "none"})


@pytest.mark.parametrize("attention", ["attention-cpu", "torch-reference"])
def test_scales_of_the_kv_cache(attention: str, llama: Checkpoint, tmp_path: Path) -> None:
    """A checkpoint's scales are those of a float8 cache, and nothing to another one."""

    def with_scales(scale: float) -> Path:
        config = {**BLOCKS, "kv_cache_scheme": "static"}
        folder = stored(llama, tmp_path / f"{scale}", config, pack_blocks)
        tensors = load_file(folder / "model.safetensors")
        layers = [
            name.removesuffix(".weight")
            for name in tensors
            if name.endswith(("k_proj.weight", "v_proj.weight"))
        ]
        save_file(
            tensors | {f"{n}.output_scale": torch.tensor(scale) for n in layers},
            folder / "model.safetensors",
        )
        return folder

    model = changed(llama, lambda name: by_block)
    fitting, too_small = with_scales(0.03), with_scales(1e-4)
    assert_logprobs(fitting, model, 0.8, attention=attention, kv_cache={"dtype": "fp8"})
    assert_logprobs(too_small, model, 2e-4, attention=attention)
    assert_logprobs(too_small, model, 0.8, attention=attention, kv_cache={"dtype": "int8"})
    with pytest.raises(AssertionError, match="off by"):  # what is above 448 * 1e-4 was cut off
        assert_logprobs(too_small, model, 0.8, attention=attention, kv_cache={"dtype": "fp8"})


BNB = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": True,
    "load_in_4bit": False,
    "llm_int8_threshold": 0.001,
}


def pack_bitsandbytes(weight: Tensor) -> dict[str, Tensor]:
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round().to(torch.int8)
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def test_a_checkpoint_of_bitsandbytes(llama: Checkpoint, tmp_path: Path) -> None:
    model = changed(llama, lambda name: int8)
    folder = stored(llama, tmp_path / "bnb", BNB, pack_bitsandbytes)
    assert_logprobs(folder, model, 5e-3)
    assert_logprobs(folder, model, 0.2, quantization={"use": "bitsandbytes", "threshold": 0})


def test_checkpoints_that_are_refused(llama: Checkpoint, tmp_path: Path) -> None:
    nibbles = BNB | {"load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    with pytest.raises(PluginError, match=r"4-bit weights \(nf4\), but only 8-bit bitsandbytes"):
        LLM(stored(llama, tmp_path / "4bit", nibbles, pack_bitsandbytes), device="cpu")
    tiles = stored(
        llama,
        tmp_path / "tiles",
        BNB,
        lambda w: pack_bitsandbytes(w) | {"weight_format": torch.tensor(1).byte()},
    )
    with pytest.raises(CheckpointError, match="stored in a GPU's tile layout"):
        LLM(tiles, device="cpu")
    negative = stored(
        llama,
        tmp_path / "negative",
        BNB,
        lambda w: pack_bitsandbytes(w) | {"SCB": -w.abs().amax(1)},
    )
    with pytest.raises(
        CheckpointError, match=r"_proj\.SCB has the value -.* scales are negative, infinite or NaN"
    ):
        LLM(negative, device="cpu")
    missing = stored(
        llama, tmp_path / "missing", BLOCKS, lambda w: {"weight": pack_blocks(w)["weight"]}
    )
    with pytest.raises(CheckpointError, match=r"lacks .*weight_scale_inv"):
        LLM(missing, device="cpu")
    e5m2 = stored(llama, tmp_path / "e5m2", BLOCKS | {"fmt": "e5m2"}, pack_blocks)
    with pytest.raises(PluginError, match=r"the checkpoint's fmt is 'e5m2' \(supported: e4m3"):
        LLM(e5m2, device="cpu")
