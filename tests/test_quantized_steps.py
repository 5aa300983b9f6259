"""Layers of a scheme that declares `compiled_steps`, in compiled steps; and how the plan's
fingerprint holds the rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Checkpoint

from dovetail import LLM, SamplingParams
from dovetail_testing.plugin import install

PROMPTS = [[5, 80, 33], [7], list(range(40, 60))]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "int8_plugin", "kit8")
    monkeypatch.syspath_prepend(tmp_path / "site")


def run(folder: Path, execution: str, **values: Any) -> tuple[list[list[int]], Any]:
    worker = {"use": "torch", "execution": execution}
    with LLM(
        folder, dtype="float32", device="cpu", attention="attention-cpu", worker=worker, **values
    ) as llm:
        outputs = llm.generate(
            PROMPTS, SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        )
        return [o.token_ids for o in outputs], llm.plan


@pytest.mark.parametrize("name", ["llama-3.1", "qwen2"])
def test_compiled_steps_with_layers_of_a_scheme(
    name: str, installed: None, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    import transformers
    from int8_plugin import Int8

    made = checkpoint(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.folder).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.lm_head:
            tensors = Int8.quantize(Int8, None, layer.weight.data)
            layer.weight.data = Int8.dequantize(Int8, None, tensors)
    reference = Checkpoint(tmp_path, model)
    expected = [reference.greedy(prompt, 16) for prompt in PROMPTS]
    assert sum(map(len, expected)) > 16, (
        "nearly every step is too close to call: the test says nothing"
    )
    compiled, plan = run(made.folder, "auto", quantization="kit8")
    if plan.choices["worker"].options["linear"] != "packed":
        pytest.skip("the kernels do not run here")
    assert plan.choices["worker"].options["execution"] == "compiled"
    plain, plan = run(made.folder, "plain", quantization="kit8")
    assert plan.choices["worker"].options["execution"] == "plain"
    for found in (compiled, plain):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[: len(theirs)] == theirs


def test_rules_are_part_of_the_fingerprint(
    installed: None, checkpoint: Callable[[str], Checkpoint]
) -> None:
    folder = checkpoint("llama-3.1").folder
    _, plain = run(folder, "plain")
    _, whole = run(folder, "plain", quantization="kit8")
    _, part = run(folder, "plain", quantization=[{"match": "*.mlp.*", "use": "kit8"}])
    assert len({plan.fingerprint for plan in (plain, whole, part)}) == 3
