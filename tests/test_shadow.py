"""Shadow runs: what a candidate shows, and that whatever it does hurts no answer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from async_engine import complete, engine_of, run, until
from checkpoints import Checkpoint

from dovetail import LLM, SamplingParams
from dovetail.composition.resolution import resolve
from dovetail.errors import ConfigError, PluginError
from dovetail.interfaces.shadow import ShadowLayer, ShadowReport
from dovetail.plugin.config import load_config
from dovetail_testing.plugin import SIMULATED, install, make_model

PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=5, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(3, 40)), list(range(3, 24)), [9]]
Answers = Callable[..., tuple[list[list[int]], ShadowReport | None]]


@pytest.fixture(autouse=True)
def chaos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    install(site)
    install(site, "chaos", "chaos")
    path = os.pathsep.join(
        filter(None, (str(site), str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    )
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(site)


@pytest.fixture
def answers(checkpoint: Callable[[str], Checkpoint]) -> Answers:
    """Of an engine: its outputs, and the report of its shadow run."""

    def of(
        shadow: dict[str, Any] | None, model: str = "mistral", **values: Any
    ) -> tuple[list[list[int]], ShadowReport | None]:
        common: dict[str, Any] = {
            "device": "cpu",
            "dtype": "float32",
            "worker": {"use": "torch", "execution": "plain"},
        }
        common |= {
            "attention": "torch-reference",
            "kv_cache": {"block_size": 4},
            "scheduler": {"max_num_batched_tokens": 16},
        }
        with LLM(checkpoint(model).folder, **{**common, **values}, shadow=shadow) as llm:
            outputs = llm.generate(PROMPTS, PARAMS)
            return [o.token_ids for o in outputs], llm.shadow

    return of


@pytest.mark.parametrize("overlap", [False, True])
def test_the_same_provider_as_candidate_shows_no_difference(
    answers: Answers, overlap: bool
) -> None:
    expected, none = answers(None, overlap=overlap)
    assert none is None
    tokens, report = answers(
        {"attention": "torch-reference", "quantization": "none", "share": 1}, overlap=overlap
    )
    assert tokens == expected
    assert report is not None
    assert {layer.key for layer in report.layers} == {
        "shadow.attention.sliding",
        "shadow.quantization",
    }
    assert all(layer.max_abs_error == layer.max_rel_error == 0 for layer in report.layers)
    assert all(
        layer.num_compared == report.num_sampled_steps
        for layer in report.layers
        if "attention" in layer.key
    )
    assert report.num_sampled_steps == report.num_steps > PARAMS.max_tokens  # type: ignore[operator]
    assert not report.failed
    assert report.extra_bytes > 0
    assert all(layer.speed > 0 for layer in report.layers)


@pytest.mark.parametrize("model", ["llama-2", "mistral", "qwen2"])
def test_another_provider_is_as_near_as_its_arithmetic(answers: Answers, model: str) -> None:
    """Through the canonical layout, windows and chunked prompts: what it is given is what the
    trusted one has."""
    expected, _ = answers(None, model)
    tokens, report = answers(
        {"attention": "attention-cpu", "share": 1}, model, kv_cache={"block_size": 16}
    )
    assert tokens == expected
    assert report is not None
    assert not report.failed
    assert {layer.layer for layer in report.layers} == {"layer 0", "layer 1"}
    assert all(0 < layer.max_rel_error < 1e-4 for layer in report.layers)


@pytest.mark.parametrize("extension_point", ["attention", "quantization"])
def test_a_wrong_candidate_shows(answers: Answers, extension_point: str) -> None:
    expected, _ = answers(None, "llama-2")
    tokens, report = answers(
        {extension_point: {"use": "chaos", "fault": "off", "at": 1}, "share": 0.5}, "llama-2"
    )
    assert tokens == expected
    assert report is not None
    assert abs(report.num_sampled_steps - report.num_steps / 2) <= 1
    wrong = {layer.layer for layer in report.layers if layer.max_rel_error > 0.1}
    right = {layer.layer for layer in report.layers} - wrong
    if extension_point == "attention":
        assert (wrong, right) == ({"layer 0", "layer 1"}, set())
    else:  # it spoils one layer
        assert wrong == {"model.layers.1.mlp.down_proj"}
        assert len(right) == 2 * 4 - 1 + 1  # the others, and the output projection
    said = report.lines({})
    assert len(said) == 1
    assert "0.5 relative" in said[0]


@pytest.mark.parametrize("fault", ["raise", "shape", "nan"])
@pytest.mark.parametrize("extension_point", ["attention", "quantization"])
def test_a_candidate_that_fails_is_switched_off_and_hurts_nobody(
    answers: Answers, extension_point: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = answers(None, "llama-2")
    tokens, report = answers(
        {extension_point: {"use": "chaos", "fault": fault, "at": 5}, "share": 1}, "llama-2"
    )
    assert tokens == expected
    assert report is not None
    if fault == "nan":
        assert sum(math.isnan(layer.max_abs_error) for layer in report.layers) == 1
        assert not report.failed
        assert "nan" in report.lines({})[0]
        return
    assert len(report.failed) == 1
    assert "dovetail-chaos:chaos" in caplog.text
    assert "switched off" in report.lines({})[0]
    assert max(layer.num_compared for layer in report.layers) < report.num_steps


def test_candidates_are_in_the_plan_and_execution_gives_way(
    checkpoint: Callable[[str], Checkpoint],
) -> None:
    values = {"model": str(checkpoint("llama-2").folder), "device": "cpu", "dtype": "float32"}
    plain = resolve(load_config(**values))
    plan = resolve(load_config(**values, shadow={"attention": "torch-reference", "share": 0.2}))
    choice = plan.choices["shadow.attention.full"]
    assert (choice.provider, choice.distribution) == ("torch-reference", "dovetail-worker-torch")
    assert plan.choices["attention.full"] == plain.choices["attention.full"]
    assert plan.choices["worker"].options["execution"] == "plain"
    assert any(
        "a shadow run compares layers one by one" in remark
        for remark in plan.choices["worker"].remarks
    )
    assert plan.fingerprint != plain.fingerprint
    assert plan.quantization_rules == plain.quantization_rules
    with pytest.raises(ConfigError, match="compiled cannot be had here: a shadow run"):
        resolve(
            load_config(
                **values,
                worker={"use": "torch", "execution": "compiled"},
                shadow={"attention": "auto"},
            )
        )
    with pytest.raises(ConfigError, match="names no candidate"):
        load_config(shadow={"share": 0.5})
    with pytest.raises(PluginError, match=r"shadow\.attention\.full: no provider 'nonsense'"):
        resolve(load_config(**values, shadow={"attention": "nonsense"}))


def test_a_worker_that_runs_no_candidates_is_not_taken(tmp_path: Path) -> None:
    config = load_config(
        model=str(make_model(tmp_path / "m")), **SIMULATED, shadow={"attention": "simulated"}
    )
    with pytest.raises(PluginError, match="does not run shadow candidates"):
        resolve(config)


def test_the_report_reaches_the_front_end_and_the_metrics() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    from dovetail_server_openai.metrics import Metrics

    async def test() -> None:
        settings = {"worker": "torch", "attention": "attention-cpu", "dtype": "float32"}
        shadow = {"attention": "torch-reference", "share": 0.5}
        async with engine_of(Path("demo"), shadow=shadow, **settings) as engine:
            await complete(engine, "import os", SamplingParams(max_tokens=8, ignore_eos=True))
            await until(lambda: engine.shadow is not None and engine.shadow.num_sampled_steps > 0)
            assert engine.shadow is not None
            worst = {layer.layer: layer.max_abs_error for layer in engine.shadow.layers}
            text = Metrics(engine, "dovetail:").text().decode()
            shown = {
                sample.labels["layer"]: sample.value
                for family in text_string_to_metric_families(text)
                if family.name == "dovetail:shadow_max_abs_error"
                for sample in family.samples
            }
            assert shown == worst
            assert "layer 0" in shown
        assert engine.shadow is not None

    run(test())


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_the_share_of_steps_is_what_was_asked_for(answers: Answers, share: float) -> None:
    _, report = answers({"attention": "torch-reference", "share": share})
    assert report is not None
    assert report.num_sampled_steps == int(report.num_steps * share + 1e-9)


def test_what_is_said_at_the_end() -> None:
    key = "shadow.attention.full"
    layers = [
        ShadowLayer(key, f"layer {i}", 3, error, error, 2.0, 1.0)
        for i, error in enumerate((0.1, 0.3))
    ]
    report = ShadowReport(0.5, 6, 3, layers)
    differs = "differs by up to 0.3 (0.3 relative), at layer 1"
    assert report.lines({key: "d:fast"}) == [
        f"{key} (d:fast): 3 of 6 steps compared; {differs}; 2 × the speed"
    ]
