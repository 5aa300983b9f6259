"""Configuration, discovery, selection and the plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from offers import attention, module_with, registry_of, resolved, why_not

from dovetail.assembly.compose import build_engine
from dovetail.composition.resolution import resolve
from dovetail.errors import CheckpointError, ConfigError, OutOfMemory, PluginError
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.plan import REASONS, Plan, Reason
from dovetail.plugin.config import EngineConfig, load_config
from dovetail.plugin.discovery import PluginInfo, installed_plugins, load_registry
from dovetail.plugin.provider import Context, Options, Provider
from dovetail_testing.plugin import SIMULATED, install, make_model


class Tuned(Options):
    workspace_mb: int = 64


def test_auto_takes_the_best_usable_and_says_why_not_the_others(model: Path) -> None:
    plan = resolved(
        model,
        attention("plain"),
        attention("fast", 50),
        attention("broken", 90, ("no compiler",)),
        attention("narrow", 99, head_sizes=(128,), dtypes=("bfloat16",)),
    )
    choice = plan.choices["attention.full"]
    assert (choice.provider, choice.requested) == ("fast", "auto")
    assert why_not(choice, "broken") == ["no compiler"]
    dtype, head_size = (
        "dtype float32 is not supported (supports bfloat16)",
        "head size 16 is not supported (supports 128)",
    )
    assert why_not(choice, "narrow") == [dtype, head_size]
    assert why_not(choice, "plain") == ["priority 0; fast has 50 (set attention.full: plain)"]
    codes = {r.provider: {reason.code for reason in r.reasons} for r in choice.rejected}
    assert codes == {"broken": {"unusable"}, "narrow": {"unsupported"}, "plain": {"priority"}}
    assert set().union(*codes.values()) <= set(REASONS)


def test_asked_for_and_impossible_is_an_error_with_the_alternatives(model: Path) -> None:
    offers = attention("plain"), attention("gpu-only", 9, devices=("cuda",))
    with pytest.raises(
        PluginError, match=r"attention\.full: 'gpu-only' cannot .* device cpu .* Usable: plain"
    ):
        resolved(model, *offers, attention="gpu-only")
    plan = resolved(model, *offers, attention={"use": "gpu-only", "on_unsupported": "fallback"})
    choice = plan.choices["attention.full"]
    assert (choice.requested, choice.provider) == ("gpu-only", "plain")
    assert why_not(choice, "gpu-only") == ["device cpu is not supported (supports cuda)"]


def test_unknown_names_get_near_matches(model: Path) -> None:
    with pytest.raises(PluginError, match=r"no provider 'plian'\. Did you mean 'plain'\?"):
        resolved(model, attention("plain"), attention="plian")


def test_layer_kinds_are_chosen_apart(tmp_path: Path) -> None:
    model = make_model(tmp_path / "sliding", window=8)
    plain, windowed = attention("plain", 50), attention("windowed", sliding_window=True)
    plan = resolved(model, plain, windowed)
    assert plan.layer_kinds == ["full", "sliding"]
    assert plan.choices["attention.full"].provider == "plain"
    assert plan.choices["attention.sliding"].provider == "windowed"
    assert why_not(plan.choices["attention.sliding"], "plain") == ["no support for sliding window"]
    plan = resolved(model, plain, windowed, attention={"full": "windowed"})
    assert {plan.choices[f"attention.{k}"].provider for k in plan.layer_kinds} == {"windowed"}


@pytest.mark.parametrize(
    ("length", "size"), [(256, 16), (257, 32), (900, 64), (2048, 128), (4096, 256), (100_000, 256)]
)
def test_a_block_size_left_open_is_what_attention_asks_for(
    tmp_path: Path, length: int, size: int
) -> None:
    """So that a sequence of maximum length has 16 blocks at most, in powers of two from 16 to
    256."""
    model = make_model(tmp_path / "long", max_len=length)
    few = attention("few", blocks_per_sequence=16)
    plan = resolved(model, few)
    assert plan.choices["kv_cache"].options["block_size"] == size
    assert (
        resolved(model, few, kv_cache={"block_size": 48}).choices["kv_cache"].options["block_size"]
        == 48
    )
    assert resolved(model, attention("any")).choices["kv_cache"].options["block_size"] == 16
    assert (
        Plan.decode(plan.encode()).fingerprint
        == resolved(model, few, kv_cache={"block_size": size}).fingerprint
    )


def test_a_block_size_left_open_is_held_against_what_is_declared(model: Path) -> None:
    plan = resolved(model, attention("plain"), attention("large", 9, block_sizes=(32,)))
    assert list(map(str, plan.choices["attention.full"].rejected[0].reasons)) == [
        "block size 16 is not supported (supports 32)"
    ]


def test_layer_kinds_must_agree_on_a_block_size(tmp_path: Path) -> None:
    model = make_model(tmp_path / "sliding", window=8, max_len=1024)
    offers = (
        attention("few", 50, blocks_per_sequence=16),
        attention("windowed", sliding_window=True),
    )
    with pytest.raises(
        ConfigError,
        match=r"block_size: .* attention\.full prefers 64, attention\.sliding prefers 16: set",
    ):
        resolved(model, *offers)
    assert resolved(model, *offers, kv_cache={"block_size": 32}).layer_kinds == ["full", "sliding"]


@pytest.mark.parametrize("size", [0, 257, "large"])
def test_block_sizes_out_of_range_are_refused(model: Path, size: Any) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache\.block_size.*Options of paged: block_size"):
        resolved(model, attention("plain"), kv_cache={"block_size": size})


def test_one_name_from_two_plugins_must_be_qualified(model: Path) -> None:
    worker = module_with(dovetail_workers=[Provider("w", "", lambda c, o: None)])
    one, two = (module_with(dovetail_attention=[attention("same")]) for _ in range(2))
    registry = registry_of(w=worker, one=one, two=two)
    with pytest.raises(
        PluginError, match=r"several plugins offer 'same'.*dist-one:same, dist-two:same"
    ):
        resolve(load_config(model=str(model), attention="same"), registry)
    plan = resolve(load_config(model=str(model), attention="dist-two:same"), registry)
    assert plan.choices["attention.full"].distribution == "dist-two"


def test_two_plugins_of_one_name_are_refused_and_both_owners_named() -> None:
    twins = [PluginInfo("twin", dist, "1", "", "m") for dist in ("dist-a", "dist-b")]
    with pytest.raises(PluginError, match=r"'twin'.*dist-a.*dist-b"):
        load_registry(twins, {"m": ModuleType("m")})
    doubled = module_with(dovetail_attention=[attention("same"), attention("same")])
    with pytest.raises(PluginError, match="'dist-x:same'"):
        registry_of(x=doubled)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import no_such_module", "ModuleNotFoundError"),
        (
            "from dovetail import hookimpl\n@hookimpl\ndef dovetail_atention(): return []",
            "dovetail_atention",
        ),
        (
            "from dovetail import hookimpl\n@hookimpl\ndef dovetail_attention(): return [1]",
            "returned int, not a Provider",
        ),
        (
            (
                "from dovetail import hookimpl\n@hookimpl\ndef dovetail_attention(): raise"
                " OSError('disk')"
            ),
            "disk",
        ),
    ],
)
def test_a_broken_plugin_hides_no_other(
    source: str,
    reason: str,
    tmp_path: Path,
    model: Path,
    simulated: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (simulated / "broken_plugin.py").write_text(source)
    install(simulated, "broken_plugin", "broken")
    monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
    registry = load_registry()
    assert reason in registry.broken["dovetail-broken"]
    plan = resolve(load_config(model=str(model), **SIMULATED), registry)
    assert plan.choices["worker"].provider == "simulated"
    with pytest.raises(PluginError, match=r"Broken plugins: .*dovetail-broken"):
        resolve(load_config(model=str(model), worker="nothing"), registry)


def test_a_scheduler_without_the_limits_that_others_read_is_broken() -> None:
    module = module_with(dovetail_schedulers=[Provider("lottery", "", lambda c, o: None, Tuned)])
    registry = registry_of(x=module)
    assert (
        "the options of lottery must be a subclass of dovetail.plugin.provider.SchedulerOptions"
        in registry.broken["dist-x"]
    )


def test_a_why_not_that_raises_is_a_reason(model: Path) -> None:
    def raises(context: Context) -> list[Reason]:
        raise KeyError("oops")

    bad = Provider(
        "bad",
        "",
        lambda c, o: None,
        capabilities=AttentionCapabilities(),
        why_not=raises,
        priority=9,
    )
    choice = resolved(model, attention("plain"), bad).choices["attention.full"]
    assert choice.provider == "plain"
    assert "its why_not raised KeyError" in why_not(choice, "bad")[0]


def test_a_build_that_fails_is_an_error_not_a_second_choice(model: Path) -> None:
    def explode(context: Any, options: Any) -> None:
        raise ValueError("no such device")

    worker = Provider("w", "", explode, priority=9)
    registry = registry_of(
        x=module_with(
            dovetail_workers=[worker, Provider("w2", "", explode)],
            dovetail_attention=[attention("plain")],
        )
    )
    plan = resolve(load_config(model=str(model)), registry)
    with pytest.raises(
        PluginError, match="worker: dist-x:w could not be built: ValueError: no such device"
    ):
        build_engine(plan, lambda *a: None, registry)


def test_unknown_options_list_the_known_ones(model: Path) -> None:
    offer = Provider("tuned", "", lambda c, o: None, Tuned, AttentionCapabilities())
    with pytest.raises(
        ConfigError, match=r"attention\.full\.worksapce_mb: Extra .* Options of tuned: workspace_mb"
    ):
        resolved(model, offer, attention={"use": "tuned", "worksapce_mb": 1})
    with pytest.raises(ConfigError, match=r"attention\.full\.workspace_mb: .*integer"):
        resolved(model, offer, attention={"use": "tuned", "workspace_mb": "much"})
    plan = resolved(model, offer, attention={"use": "tuned", "workspace_mb": 8})
    assert plan.choices["attention.full"].options == {"workspace_mb": 8}


def test_the_fingerprint_is_of_what_is_computed(model: Path, tmp_path: Path) -> None:
    offers = attention("plain"), attention("other", -1)
    plan = resolved(model, *offers)
    assert Plan.decode(plan.encode()).fingerprint == plan.fingerprint
    moved = make_model(tmp_path / "elsewhere")
    same = resolve(
        load_config(model=str(moved), served_model_name=plan.served_model_name),
        registry_of(
            x=module_with(
                dovetail_workers=[Provider("w", "", lambda c, o: None)],
                dovetail_attention=list(offers),
            )
        ),
    )
    assert same.folder != plan.folder
    assert resolved(model, *offers, attention="other").fingerprint != plan.fingerprint
    assert resolved(model, *offers, kv_cache={"block_size": 8}).fingerprint != plan.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv_cache: [1]", r"engine\.yaml: kv_cache"),
        ("max_model_len: long", r"engine\.yaml: max_model_len: .*integer"),
        ("modle: demo", r"modle: Extra inputs.*Keys: model"),
        ("- a\n- b", "expected a mapping"),
        ("a: [", "engine.yaml"),
        ("model: ''", "model: .*empty"),
    ],
)
def test_bad_files_name_file_and_path(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_precedence_is_code_over_environment_over_file(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text(
        'dtype = "float16"\nmax_num_waiting = 5\n[scheduler]\nmax_num_seqs ='
        " 3\nmax_num_batched_tokens = 64\n"
    )
    env = {"DOVETAIL_DTYPE": "bfloat16", "DOVETAIL_MAX_NUM_WAITING": "7", "DOVETAIL_UNRELATED": "x"}
    config = load_config(
        path, env, dtype="float32", scheduler={"use": "priority", "max_num_seqs": 9}
    )
    assert (config.dtype, config.max_num_waiting) == ("float32", 7)
    assert config.scheduler.use == "priority"
    assert config.scheduler.options == {"max_num_seqs": 9, "max_num_batched_tokens": 64}
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.yaml")


def test_config_round_trips() -> None:
    config = load_config(env={}, attention={"sliding": {"use": "a", "x": 1}}, worker="w")
    assert EngineConfig.model_validate(config.model_dump()) == config


def test_models_that_are_not_there(tmp_path: Path) -> None:
    registry = registry_of()
    with pytest.raises(ConfigError, match="neither a model provided by a plugin"):
        resolve(load_config(model="nonsense"), registry)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        resolve(load_config(model=str(tmp_path)), registry)
    (tmp_path / "config.json").write_text('{"hidden_size": "wide"}')
    with pytest.raises(
        CheckpointError, match="hidden_size must be a positive integer, found 'wide'"
    ):
        resolve(load_config(model=str(tmp_path)), registry)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        resolve(load_config(model=str(tmp_path)), registry)


def test_a_context_longer_than_the_models_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len: 999 exceeds the model's context of 256"):
        resolved(model, attention("plain"), max_model_len=999)


def test_too_little_kv_memory_says_what_would_fit(model: Path, simulated: Path) -> None:
    plan = resolve(load_config(model=str(model), prefix_cache="none", **SIMULATED))
    engine = build_engine(plan, lambda *a: None)
    engine.worker._memory = 100  # type: ignore[attr-defined]
    from dovetail_testing import plugin

    small = plugin.SimulatedWorker([], memory=64 * 9)
    small._groups = engine.kv.groups
    offer = Provider("simulated", "", lambda c, o: small, plugin.SimulatedOptions)
    info = next(p for p in installed_plugins() if p.name == "simulated")
    core = next(p for p in installed_plugins() if p.name == "core")
    module = module_with(dovetail_workers=[offer], dovetail_attention=[attention("simulated")])
    with pytest.raises(OutOfMemory, match=r"lower max_model_len to (\d+)") as e:
        build_engine(plan, lambda *a: None, load_registry([core, info], {info.module: module}))
    assert small.closed
    fits = int(str(e.value).split("lower max_model_len to ")[1].split(",")[0])
    smaller = resolve(
        load_config(model=str(model), prefix_cache="none", max_model_len=fits, **SIMULATED)
    )
    build_engine(smaller, lambda *a: None, load_registry([core, info], {info.module: module}))


def test_plugins_are_listed_without_importing_them(simulated: Path) -> None:
    (simulated / "heavy.py").write_text("raise SystemExit('imported')")
    install(simulated, "heavy", "heavy")
    listed = {p.name: p for p in installed_plugins()}
    assert listed["heavy"].distribution == "dovetail-heavy"
    assert listed["heavy"].summary == "for tests"
    assert json.dumps(listed["core"].version)
