"""Model code from outside: found, chosen over the bridge, with packed and quantized layers it knows
nothing of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Checkpoint
from safetensors.torch import load_file, save_file
from third_party import conform, imports_of, run, site_of

from dovetail import LLM, SamplingParams

NAME = "architecture_gpt2"
PROMPTS = [[5, 80, 33], [7], list(range(40, 90))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_of(NAME, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def gpt2(
    site: Path, checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> Checkpoint:
    monkeypatch.syspath_prepend(site)
    return checkpoint("gpt2 (bridge)")


def tokens_of(folder: Path, file: Path, **values: Any) -> list[list[int]]:
    with LLM(folder, config=file, dtype="float32", device="cpu", **values) as llm:
        assert llm.plan.choices["architecture"].distribution == "dovetail-architecture-gpt2"
        outputs = llm.generate(
            PROMPTS, SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        )
        return [o.token_ids for o in outputs]


def logprobs_of(folder: Path, file: Path, **values: Any) -> list[float]:
    """Of the first tokens: the weights show in them, where a random model's tokens may well be the
    same."""
    with LLM(folder, config=file, dtype="float32", device="cpu", **values) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=1, temperature=0, logprobs=1))
        return [max(o.logprobs[0].values()) for o in outputs if o.logprobs]


def assert_same(found: list[list[int]], reference: Checkpoint) -> None:
    expected = [reference.greedy(prompt, 16) for prompt in PROMPTS]
    assert sum(map(len, expected)) > 16, (
        "nearly every step is too close to call: the test says nothing"
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[: len(theirs)] == theirs


def test_it_passes_the_conformance_kit(site: Path) -> None:
    conform(NAME, site)


def test_it_imports_the_core_and_torch_only() -> None:
    assert imports_of(NAME) == {"dovetail", "torch"}


def test_it_is_taken_and_the_bridge_is_not(site: Path, gpt2: Checkpoint) -> None:
    out = run(site, "-m", "dovetail.cli.main", "explain", "--model", str(gpt2.folder), "--json")
    choice = json.loads(out.stdout)["choices"]["architecture"]
    assert (choice["provider"], choice["requested"]) == ("gpt2", "auto")
    why = {r["provider"]: r["reasons"][0]["text"] for r in choice["rejected"]}
    assert why["transformers"] == "priority 0; gpt2 has 10"
    assert why["decoder"] == "no support for GPT2LMHeadModel"


@pytest.mark.parametrize("worker", ["{}", "{linear: torch}", "{execution: plain}"])
@pytest.mark.parametrize("backend", ["torch-reference", "attention-cpu"])
def test_an_engine_from_a_file_gives_what_transformers_gives(
    worker: str, backend: str, gpt2: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(
        f"architecture: gpt2\nworker: {worker}\nattention: {backend}\nscheduler:"
        " {max_num_batched_tokens: 24}\n"
    )
    assert_same(tokens_of(gpt2.folder, file), gpt2)


def test_checkpoints_without_the_prefix_are_read(gpt2: Checkpoint, tmp_path: Path) -> None:
    """As the first ones were saved, with their masks."""
    file = tmp_path / "engine.yaml"
    file.write_text("architecture: gpt2\n")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((gpt2.folder / "config.json").read_text())
    tensors = {
        name.removeprefix("transformer."): t
        for name, t in load_file(gpt2.folder / "model.safetensors").items()
    }
    save_file(
        {**tensors, "h.0.attn.bias": tensors["wpe.weight"].clone()}, old / "model.safetensors"
    )
    assert tokens_of(old, file) == tokens_of(gpt2.folder, file)


def test_it_can_be_quantized_by_a_third_party_scheme(
    gpt2: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "wheel"
    wheel.mkdir()
    monkeypatch.syspath_prepend(site_of("quant_nf4", wheel))
    file = tmp_path / "engine.yaml"
    file.write_text('quantization: [{match: "*.mlp.*", use: nf4}]\n')
    assert all(len(tokens) == 16 for tokens in tokens_of(gpt2.folder, file))
    plain, nf4 = logprobs_of(gpt2.folder, file, quantization="none"), logprobs_of(gpt2.folder, file)
    assert len(nf4) == len(PROMPTS)
    assert all(abs(a - b) > 1e-4 for a, b in zip(plain, nf4, strict=True))
