"""Choosing schemes and model code from data; where parts and shards of a layer's tensors lie."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_composition import attention, module_with, registry_of

from dovetail.composition.resolution import resolve
from dovetail.errors import CheckpointError, ConfigError, PluginError
from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.interfaces.quantization import (
    IN,
    OUT,
    Axis,
    LinearLayer,
    Parameter,
    Part,
    QuantizationCapabilities,
    quantization_rule,
)
from dovetail.plan import Plan
from dovetail.plugin.config import EngineConfig, load_config
from dovetail.plugin.provider import Provider
from dovetail_testing.plugin import make_model


def scheme(name: str, *methods: str, on_the_fly: bool = False, **can: Any) -> Provider[Any]:
    return Provider(
        name,
        "",
        lambda c, o: None,
        capabilities=QuantizationCapabilities(methods, on_the_fly, **can),
    )


def architecture(
    name: str, *names: str, quantization: bool = True, priority: int = 0
) -> Provider[Any]:
    can = ArchitectureCapabilities(names or None, quantization=quantization)
    return Provider(name, "", lambda c, o: None, capabilities=can, priority=priority)


OFFERS = scheme("fp8", "fp8", on_the_fly=True), scheme("awq", "awq"), scheme("nf4", on_the_fly=True)


def resolved(
    model: Path,
    quantization: Any = "auto",
    offers: Any = OFFERS,
    architectures: Any = (),
    **values: Any,
) -> Plan:
    worker = Provider("w", "", lambda c, o: None)
    module = module_with(
        dovetail_workers=[worker],
        dovetail_attention=[attention("plain")],
        dovetail_quantization=list(offers),
        dovetail_architectures=list(architectures),
    )
    return resolve(
        load_config(model=str(model), device="cpu", quantization=quantization, **values),
        registry_of(x=module),
    )


def rules(plan: Plan) -> list[tuple[str, str, str]]:
    return [
        (k, c.match, c.provider)
        for k, c in plan.choices.items()
        if c.extension_point == "quantization"
    ]


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    return quantized(tmp_path, {"quant_method": "awq", "bits": 4})


def quantized(folder: Path, config: Any) -> Path:
    path = make_model(folder / "quantized") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    return path.parent


def test_auto_is_what_the_checkpoint_is(model: Path, awq: Path) -> None:
    plan = resolved(model)
    assert rules(plan) == [("quantization", "*", "none")]
    why = {r.provider: list(map(str, r.reasons)) for r in plan.choices["quantization"].rejected}
    assert why["awq"] == ["the checkpoint is not quantized (reads awq)"]
    assert why["nf4"] == [
        "the checkpoint is not quantized (request it by name to quantize the weights while they are"
        " loaded)"
    ]
    plan = resolved(awq)
    assert rules(plan) == [("quantization", "*", "awq")]
    why = {r.provider: list(map(str, r.reasons)) for r in plan.choices["quantization"].rejected}
    assert why["none"] == ["the checkpoint is quantized with awq (reads none)"]
    assert why["nf4"] == ["the checkpoint is quantized with awq (quantizes plain weights)"]


def test_a_scheme_for_the_whole_model_leaves_the_output_projection(model: Path, awq: Path) -> None:
    assert rules(resolved(model, "nf4")) == [
        ("quantization.0", "lm_head", "none"),
        ("quantization.1", "*", "nf4"),
    ]
    assert rules(resolved(awq, "awq")) == [("quantization", "*", "awq")]
    assert rules(resolved(model, "none")) == [("quantization", "*", "none")]
    everything = [{"match": "*", "use": "nf4"}]
    assert ("quantization.0", "lm_head", "none") in rules(resolved(model, everything))


def test_the_first_rule_that_matches_counts_and_the_rest_is_as_the_checkpoint_is(
    model: Path, awq: Path
) -> None:
    wanted = [{"match": "*.q_proj", "use": "none"}, {"match": "*.self_attn.*", "use": "fp8"}]
    assert [r[1:] for r in rules(resolved(model, wanted))] == [
        ("*.q_proj", "none"),
        ("*.self_attn.*", "fp8"),
        ("*", "none"),
    ]
    plan = resolved(awq, wanted)
    assert [r[1:] for r in rules(plan)] == [
        ("*.q_proj", "none"),
        ("*.self_attn.*", "fp8"),
        ("*", "awq"),
    ]

    def of(*names: str) -> str:
        parts = tuple(Part(f"l.self_attn.{n}", 8) for n in names)
        return quantization_rule(plan, LinearLayer("fused", parts, 8, False, "float32"))

    assert (of("q_proj"), of("k_proj", "v_proj")) == ("quantization.0", "quantization.1")
    with pytest.raises(
        ConfigError,
        match=r"all parts of the fused layer fused alike.*q_proj: none, l.self_attn.k_proj: fp8",
    ):
        of("q_proj", "k_proj")


def test_what_does_not_fit_shows_both(model: Path, awq: Path) -> None:
    with pytest.raises(
        PluginError,
        match=r"quantization: 'fp8' cannot be used here: the checkpoint is quantized with awq",
    ):
        resolved(awq, "fp8")
    with pytest.raises(
        PluginError,
        match=r"quantization: 'none' cannot be used here: the checkpoint is quantized with awq",
    ):
        resolved(awq, "none")
    with pytest.raises(
        PluginError,
        match=r"quantization: 'awq' cannot be used here: the checkpoint is not quantized",
    ):
        resolved(model, "awq")
    with pytest.raises(
        PluginError,
        match=r"quantization\.0: 'awq' cannot be used here: the checkpoint is not quantized",
    ):
        resolved(model, [{"match": "*.mlp.*", "use": "awq"}])
    with pytest.raises(
        PluginError, match=r"quantization\.1: no provider 'nf5'. Did you mean 'nf4'"
    ):
        resolved(model, [{"match": "a", "use": "nf4"}, {"match": "b", "use": "nf5"}])
    with pytest.raises(ConfigError, match=r"quantization\.0\.bits: Extra inputs"):
        resolved(model, [{"match": "*.mlp.*", "use": "nf4", "bits": 3}])
    with pytest.raises(PluginError, match="dtype float32 is not supported"):
        resolved(model, "half", offers=[scheme("half", on_the_fly=True, dtypes=("bfloat16",))])


def test_a_method_that_nobody_reads_names_near_ones_and_what_would_help(tmp_path: Path) -> None:
    folder = quantized(tmp_path, {"quant_method": "fbgemm_fp8"})
    near = (
        r"with 'fbgemm_fp8', which no installed plugin reads. Similar: fp8 \(dist-x:fp8\)."
        r" Installed: awq, fp8. Install"
    )
    with pytest.raises(PluginError, match=near):
        resolved(folder)
    with pytest.raises(PluginError, match=r"'fbgemm_fp8'.*Installed: none"):
        resolved(folder, offers=[])


@pytest.mark.parametrize("config", [[], {"bits": 4}, {"quant_method": 8}, "awq"])
def test_a_quantization_config_that_says_no_method_is_an_error(config: Any, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"config.json: quantization_config must have a quant_method"
    ):
        resolved(quantized(tmp_path, config))


@pytest.mark.parametrize(
    "value",
    [
        "nf4",
        {"use": "nf4", "block": 8},
        [{"match": "*.mlp.*", "use": "nf4", "block": 8}, {"match": "lm_head", "use": "none"}],
    ],
)
def test_forms_of_the_configuration(value: Any) -> None:
    config = load_config(env={}, quantization=value)
    assert EngineConfig.model_validate(config.model_dump()) == config
    first = config.quantization.rules[0]
    assert (first.use, first.match) == ("nf4", "*.mlp.*" if isinstance(value, list) else "*")
    assert first.options == ({} if value == "nf4" else {"block": 8})


def test_architectures_are_chosen_by_what_they_declare(model: Path) -> None:
    own, other = (
        architecture("own", "SimulatedForCausalLM"),
        architecture("other", "OtherForCausalLM", priority=99),
    )
    bridge = architecture("bridge", quantization=False, priority=50)
    plan = resolved(model, architectures=(own, other, bridge))
    assert plan.choices["architecture"].provider == "bridge"
    why = {r.provider: list(map(str, r.reasons)) for r in plan.choices["architecture"].rejected}
    assert why["other"] == ["no support for SimulatedForCausalLM"]
    plan = resolved(model, "nf4", architectures=(own, other, bridge))
    assert plan.choices["architecture"].provider == "own"
    why = {r.provider: list(map(str, r.reasons)) for r in plan.choices["architecture"].rejected}
    assert why["bridge"] == ["its linear layers cannot be quantized (nf4)"]
    with pytest.raises(PluginError, match="architecture: 'other' cannot be used here"):
        resolved(model, architectures=(own, other), architecture="other")


def test_without_anybodys_model_code_there_is_no_choice(model: Path) -> None:
    assert "architecture" not in resolved(model).choices
    with pytest.raises(PluginError, match="architecture: no provider 'own'"):
        resolved(model, architecture="own")


# Where things lie.

GPTQ = {
    "qweight": Parameter((Axis("in", 8), OUT), "int32"),
    "qzeros": Parameter((Axis("in", 128), Axis("out", 8)), "int32"),
    "scales": Parameter((Axis("in", 128), OUT), "float16"),
    "g_idx": Parameter((IN,), "int32"),
}
QKV = LinearLayer("qkv", (Part("q", 512), Part("k", 128), Part("v", 128)), 256, False, "float32")


def test_parts_of_a_packed_layer() -> None:
    shapes = {name: p.shape(QKV) for name, p in GPTQ.items()}
    assert shapes == {
        "qweight": (32, 768),
        "qzeros": (2, 96),
        "scales": (2, 768),
        "g_idx": (3, 256),
    }
    assert {n: p.part_shape(QKV, 1) for n, p in GPTQ.items()} == {
        "qweight": (32, 128),
        "qzeros": (2, 16),
        "scales": (2, 128),
        "g_idx": (256,),
    }
    every = slice(None)
    assert {n: p.part_index(QKV, 2) for n, p in GPTQ.items()} == {
        "qweight": (every, slice(640, 768)),
        "qzeros": (every, slice(80, 96)),
        "scales": (every, slice(640, 768)),
        "g_idx": (2,),
    }


def test_shards_of_a_packed_layer() -> None:
    every = slice(None)
    assert {n: p.shard_index(QKV, 1, "out", 3, 4) for n, p in GPTQ.items()} == {
        "qweight": (every, slice(96, 128)),
        "qzeros": (every, slice(12, 16)),
        "scales": (every, slice(96, 128)),
        "g_idx": (every,),
    }
    assert {n: p.shard_index(QKV, 1, "in", 1, 2) for n, p in GPTQ.items()} == {
        "qweight": (slice(16, 32), every),
        "qzeros": (slice(1, 2), every),
        "scales": (slice(1, 2), every),
        "g_idx": (slice(128, 256),),
    }
    with pytest.raises(
        ValueError, match=r"q: 256 inputs, stored in units of 128, cannot be shared by 4 ranks"
    ):
        GPTQ["scales"].shard_index(QKV, 0, "in", 0, 4)
    with pytest.raises(ValueError, match="q has 512 outputs, which 3 ranks cannot share evenly"):
        QKV.shard("out", 0, 3)
    assert [p.out_features for p in QKV.shard("out", 1, 2).parts] == [256, 64, 64]
    assert QKV.shard("in", 1, 2).in_features == 128


def test_blocks_that_are_not_whole_end_with_their_part() -> None:
    scales = Parameter((Axis("out", 128), Axis("in", 128)), "float32")
    layer = LinearLayer("fused", (Part("a", 576), Part("b", 64)), 300, False, "bfloat16")
    assert scales.shape(layer) == (6, 3)
    assert [scales.part_index(layer, i)[0] for i in range(2)] == [slice(0, 5), slice(5, 6)]
    tensor_scale = Parameter((), "float32")
    assert tensor_scale.shape(layer) == (2,)
    assert tensor_scale.part_index(layer, 1) == (1,)
    three_bits = Parameter((Axis("in", 32, elements=3), OUT), "int32")
    assert three_bits.part_shape(QKV, 0) == (24, 512)


@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    groups=st.integers(1, 6),
    unit=st.sampled_from([1, 2, 8]),
    size=st.sampled_from([1, 2, 3, 4]),
    side=st.sampled_from(["out", "in"]),
)
def test_shards_are_the_whole_cut_up(
    parts: list[int], groups: int, unit: int, size: int, side: Any
) -> None:
    """Placing every rank's slice of every part covers the rank's tensor exactly once, and all of
    the checkpoint's."""
    outs = [unit * size * n for n in parts]
    layer = LinearLayer(
        "l",
        tuple(Part(f"p{i}", n) for i, n in enumerate(outs)),
        unit * size * groups,
        False,
        "float32",
    )
    axes = [Axis("out", unit), Axis("in", unit)]
    parameter = Parameter(tuple(random.sample(axes, 2)), "int32")
    for rank in range(size):
        shard = layer.shard(side, rank, size)
        shape = parameter.shape(shard)
        filled = set()
        for i in range(len(parts)):
            source = parameter.shard_index(layer, i, side, rank, size)
            whole = parameter.part_shape(layer, i)
            taken = [len(range(n)[s]) for n, s in zip(whole, source, strict=True)]
            place = [
                range(n)[s] for n, s in zip(shape, parameter.part_index(shard, i), strict=False)
            ]
            place += [range(n) for n in shape[len(place) :]]
            assert [len(p) for p in place] == taken
            cells = {(a, b) for a in place[0] for b in place[1]}
            assert not cells & filled
            filled |= cells
        assert len(filled) == shape[0] * shape[1]
