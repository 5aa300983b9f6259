"""A quantization scheme from outside, in engines composed from files: on the fly, from its own
layout, for some layers only."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Checkpoint
from safetensors.torch import load_file
from third_party import conform, imports_of, run, site_of

from dovetail import LLM, SamplingParams
from dovetail.composition.resolution import resolve
from dovetail.errors import ConfigError, PluginError
from dovetail.plugin.config import load_config

NAME = "quant_nf4"
RULES = """
quantization:
  - {match: "*.layers.0.self_attn.*", use: none}
  - {match: "*.layers.1.*", use: nf4, block_size: 16}
  - {match: "*.layers.0.*", use: nf4, block_size: 32}
"""
PROMPTS = [[5, 80, 33], [7], [100, 4, 61, 9, 150, 12, 13]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_of(NAME, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(site)
    return site


@pytest.fixture
def llama(checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint("llama-3.1")


def tokens_of(model: Path, settings: dict[str, Any] | Path) -> list[list[int]]:
    values: Any = {"config": settings} if isinstance(settings, Path) else settings
    with LLM(model, dtype="float32", device="cpu", **values) as llm:
        outputs = llm.generate(
            PROMPTS, SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        )
        return [o.token_ids for o in outputs]


def logprobs_of(model: Path, settings: dict[str, Any] | Path) -> list[float]:
    """Of the first tokens: the weights show in them, where a random model's tokens may well be the
    same."""
    values: Any = {"config": settings} if isinstance(settings, Path) else settings
    with LLM(model, dtype="float32", device="cpu", **values) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=1, temperature=0, logprobs=1))
        return [max(o.logprobs[0].values()) for o in outputs if o.logprobs]


def with_dequantized_weights(
    source: Checkpoint, block_size: Callable[[str], int | None], folder: Path
) -> Checkpoint:
    """The same model with plain weights that are what the scheme makes of them; `block_size` by
    name of a layer."""
    import transformers

    from dovetail.interfaces.quantization import LinearLayer, Part
    from dovetail_quant_nf4.scheme import NF4  # type: ignore[import-not-found]

    model = transformers.AutoModelForCausalLM.from_pretrained(source.folder).eval()
    changed = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (size := block_size(name)):
            scheme, part = NF4({}, size), Part(name, module.out_features)
            layer = LinearLayer(name, (part,), module.in_features, False, "float32", stored=False)
            module.weight.data = scheme.dequantize(
                layer, scheme.quantize(layer, module.weight.data)
            )
            changed += 1
    assert changed
    model.save_pretrained(folder)
    return Checkpoint(folder, model)


def assert_same(found: list[list[int]], reference: Checkpoint) -> None:
    expected = [reference.greedy(prompt, 16) for prompt in PROMPTS]
    assert sum(map(len, expected)) > 16, (
        "nearly every step is too close to call: the test says nothing"
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[: len(theirs)] == theirs


def test_it_passes_the_conformance_kit(site: Path) -> None:
    conform(NAME, site)


def test_it_imports_the_core_and_its_own_libraries_only() -> None:
    assert imports_of(NAME) == {"dovetail", "torch", "pydantic", "safetensors"}


def test_a_composition_file_is_explained(site: Path, llama: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(RULES)
    out = run(
        site,
        "-m",
        "dovetail.cli.main",
        "explain",
        str(file),
        "--model",
        str(llama.folder),
        "--device",
        "cpu",
        "--json",
    )
    choices = json.loads(out.stdout)["choices"]
    rules = [
        (c["match"], c["provider"])
        for c in choices.values()
        if c["extension_point"] == "quantization"
    ]
    scheme = [("*.layers.1.*", "nf4"), ("*.layers.0.*", "nf4")]
    assert rules == [("*.layers.0.self_attn.*", "none"), *scheme, ("*", "none")]
    assert choices["quantization.1"]["options"] == {"block_size": 16}
    assert choices["worker"]["options"]["execution"] == "plain"
    assert any(
        "the quantization chosen cannot be part of a compiled step" in r
        for r in choices["worker"]["remarks"]
    )
    text = run(
        site,
        "-m",
        "dovetail.cli.main",
        "explain",
        str(file),
        "--model",
        str(llama.folder),
        "--device",
        "cpu",
    ).stdout
    assert "quantization.2 (*.layers.0.*)" in text


def test_an_engine_from_a_file_computes_with_the_quantized_weights(
    installed: Path, llama: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(RULES)

    def block_size(name: str) -> int | None:
        return (
            None
            if name == "lm_head" or ".layers.0.self_attn." in name
            else 16
            if ".layers.1." in name
            else 32
        )

    reference = with_dequantized_weights(llama, block_size, tmp_path / "dequantized")
    found = tokens_of(llama.folder, file)
    assert_same(found, reference)
    assert logprobs_of(llama.folder, file) != logprobs_of(llama.folder, {})


def test_its_own_layout_says_itself_how_it_is_read(
    installed: Path, llama: Checkpoint, tmp_path: Path
) -> None:
    from dovetail_quant_nf4.convert import convert  # type: ignore[import-not-found]

    convert(llama.folder, tmp_path / "packed", 32)
    stored = load_file(tmp_path / "packed/model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.codes"].dtype == torch.uint8
    assert "model.layers.0.mlp.up_proj.weight" not in stored
    reference = with_dequantized_weights(
        llama, lambda n: None if n == "lm_head" else 32, tmp_path / "dequantized"
    )
    found = tokens_of(tmp_path / "packed", {})
    assert_same(found, reference)
    assert found == tokens_of(llama.folder, {"quantization": {"use": "nf4", "block_size": 32}})


def test_layers_that_it_declines_are_named(
    installed: Path, llama: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """96 inputs of the down projections are not blocks of 64; the other layers are quantized."""
    plain, nf4 = logprobs_of(llama.folder, {}), logprobs_of(llama.folder, {"quantization": "nf4"})
    assert plain != nf4
    assert "down_proj" in caplog.text
    assert "96 inputs are not whole blocks of 64" in caplog.text


def test_rules_that_cannot_be_are_errors(
    installed: Path, llama: Checkpoint, tmp_path: Path
) -> None:
    split = [{"match": "*.q_proj", "use": "nf4"}]
    parts = (
        r"parts of the fused layer model\.layers\.0\.self_attn\.qkv_proj alike.*q_proj:"
        r" nf4.*k_proj: none"
    )
    with pytest.raises(ConfigError, match=parts):
        tokens_of(llama.folder, {"quantization": split})
    with pytest.raises(
        ConfigError,
        match=r"quantization\.0: '\*\.mpl\.\*' matches no linear layer.*self_attn\.q_proj",
    ):
        tokens_of(llama.folder, {"quantization": [{"match": "*.mpl.*", "use": "nf4"}]})


def test_a_model_that_makes_its_own_layers_is_not_quantized(
    installed: Path, checkpoint: Callable[[str], Checkpoint]
) -> None:
    folder = checkpoint("gemma2 (bridge)").folder
    with pytest.raises(
        PluginError, match=r"transformers: its linear layers cannot be quantized \(nf4\)"
    ):
        resolve(load_config(model=str(folder), quantization="nf4", device="cpu"))


def test_a_broken_packed_file_is_named(installed: Path, llama: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from dovetail.errors import CheckpointError
    from dovetail_quant_nf4.convert import convert

    convert(llama.folder, tmp_path / "packed", 32)
    path = tmp_path / "packed/model.safetensors"
    whole, name = load_file(path), "model.layers.1.mlp.gate_proj.scales"
    random_rows = random.randint(1, 90)
    for broken, message in (
        ({n: t for n, t in whole.items() if n != name}, f"lacks {name}"),
        (
            {**whole, name: whole[name][:random_rows].clone()},
            rf"{name} has shape \[{random_rows}, 4\]",
        ),
        ({**whole, name: whole[name].to(torch.int8)}, f"{name} is stored as int8"),
    ):
        save_file(broken, path)
        with pytest.raises(CheckpointError, match=message):
            tokens_of(tmp_path / "packed", {})
