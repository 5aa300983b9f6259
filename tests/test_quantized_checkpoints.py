"""Quantized checkpoints, end to end: four that the ecosystem's tools made, and every format as the
tests pack it.

Logits are compared, in float32: errors are relative to the spread of the logits.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from awq_gptq_packers import make_awq, make_gptq
from ct_packers import make as make_ct
from quantized import SIZES, Config, Make, Rounding, error, errors, next_tokens, quantize
from torch import Tensor

from dovetail.composition.resolution import resolve
from dovetail.plugin.config import load_config
from dovetail_testing.plugin import install

CHECKPOINTS = Path(__file__).parent / "checkpoints"
ROUNDING = 1e-4
"""Of float32, and of sums in another order."""
CROSSED = 0.05
"""Where inputs are rounded, one that lies between two codes may fall to either by a difference of
the last bit: so may one prompt in many."""
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {"matmul": "torch", "worker": {"use": "torch", "execution": "plain"}},
    "compiled": {
        "matmul": "cpu",
        "worker": {"use": "torch", "execution": "compiled"},
        "attention": "attention-cpu",
    },
    "plain, kernels": {"matmul": "cpu", "worker": {"use": "torch", "execution": "plain"}},
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    values = ENGINES[request.param]
    if values["matmul"] == "cpu":
        plan = resolve(
            load_config(model=str(CHECKPOINTS / "gptq_w4_g128_sym"), device="cpu", dtype="float32")
        )
        choice = plan.choices["matmul"]
        if choice.provider != "cpu":
            pytest.skip(
                "the kernels do not run here:"
                f" {[str(r) for c in choice.rejected for r in c.reasons]}"
            )
    return values


# What the ecosystem's tools made.


@pytest.mark.parametrize(
    ("name", "scheme", "limits"),
    [
        ("awq_w4_g128_gemm", "awq", {"dequant_top5": ROUNDING, "hf_native_top5": 0.015}),
        ("gptq_w4_g128_sym", "gptq", {"dequant_top5": ROUNDING, "hf_native_top5": 0.015}),
        ("ct_int8_w8a8_rtn", "compressed-tensors", {"hf_native_top5": 0.05, "hf_fp32_top5": 0.05}),
        ("ct_fp8_dynamic", "compressed-tensors", {"hf_native_top5": 0.1, "hf_fp32_top5": ROUNDING}),
    ],
)
def test_checkpoints_of_the_ecosystem(
    name: str, scheme: str, limits: dict[str, float], engine: dict[str, Any]
) -> None:
    """`dequant_top5`: weights dequantized by another program. `hf_…`: transformers, in bfloat16 and
    in float32; its kernels for 4 bits compute in 16, and its scale of int8 inputs is another by
    half a code."""
    expected = json.loads((CHECKPOINTS / name / "expected.json").read_text())["prompts"]
    found, plan = next_tokens(
        CHECKPOINTS / name, [prompt["input_ids"] for prompt in expected], **engine
    )
    assert plan.choices["quantization"].provider == scheme
    for ours, prompt in zip(found, expected, strict=True):
        assert max(ours, key=ours.__getitem__) == prompt["dequant_top5"][0][0]
        for key, limit in limits.items():
            assert error(ours, dict(prompt[key]), prompt["logit_std"]) < limit, key


# Every format, packed here.


def by_token(largest: float) -> Rounding:
    """Each row by a scale of its own, to int8 or (448) float8."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / largest
        return scale * (
            (x / scale).round() if largest == 127 else (x / scale).to(torch.float8_e4m3fn).float()
        )

    return rounded


def static_float8(x: Tensor) -> Tensor:
    """By the packer's scale."""
    scale = torch.tensor(4.0 / 448).bfloat16().float()
    return scale * (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()


def everything(make: Make) -> list[tuple[str, Make | None]]:
    return [("lm_head", None), ("*", make)]


def check(
    folder: Path,
    config: Config,
    make: Make,
    engine: dict[str, Any],
    rounding: Rounding | None = None,
) -> None:
    found = errors(quantize(folder, config, everything(make), rounding), **engine)
    assert found[len(found) // 2] < ROUNDING
    assert found[-1] < (CROSSED if rounding else ROUNDING)


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
def test_awq(group: int, engine: dict[str, Any], tmp_path: Path) -> None:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
    }
    check(tmp_path, config, lambda weight: make_awq(config, weight), engine)


MATRIX = list(
    itertools.product((4, 8), (-1, 32, 64, 128), (True, False), (True, False), ("gptq", "gptq_v2"))
)


@pytest.mark.parametrize(("bits", "group", "symmetric", "ordered", "version"), MATRIX)
def test_gptq(
    bits: int,
    group: int,
    symmetric: bool,
    ordered: bool,
    version: str,
    engine: dict[str, Any],
    tmp_path: Path,
) -> None:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": ordered,
        "checkpoint_format": version,
    }
    check(tmp_path, config, lambda weight: make_gptq(config, weight), engine)


def ct(format: str, inputs: Config | None = None, **weights: Any) -> Config:
    kind = "float" if format == "float-quantized" else "int"
    given = inputs and {"num_bits": 8, "type": kind, "symmetric": True, **inputs}
    group = {"num_bits": 8, "type": kind, "symmetric": True, **weights}
    entry = {"targets": ["Linear"], "weights": group, "input_activations": given, "format": format}
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": entry},
    }
    return config | {"ignore": ["lm_head"]}


BY_TOKEN = {"strategy": "token", "dynamic": True}
CT: list[tuple[Config, Rounding | None]] = [
    (ct("float-quantized", BY_TOKEN, strategy="channel"), by_token(448)),
    (
        ct("float-quantized", {"strategy": "tensor", "dynamic": False}, strategy="tensor"),
        static_float8,
    ),
    (ct("float-quantized", strategy="tensor"), None),
    (ct("float-quantized", strategy="block", block_structure=[128, 128]), None),
    (ct("float-quantized", strategy="block", block_structure=[48, 64]), None),
    (ct("int-quantized", BY_TOKEN, strategy="channel"), by_token(127)),
    (ct("int-quantized", BY_TOKEN, strategy="channel", symmetric=False), by_token(127)),
    (ct("int-quantized", BY_TOKEN, strategy="tensor"), by_token(127)),
    (ct("int-quantized", strategy="group", group_size=32), None),
    (ct("pack-quantized", BY_TOKEN, num_bits=4, strategy="group", group_size=64), by_token(127)),
    *(
        (
            ct(
                "pack-quantized",
                num_bits=bits,
                symmetric=symmetric,
                strategy="group",
                group_size=group,
            ),
            None,
        )
        for bits, symmetric, group in itertools.product((4, 8), (True, False), (32, 128))
    ),
    *(
        (ct("pack-quantized", num_bits=bits, symmetric=symmetric, strategy="channel"), None)
        for bits, symmetric in itertools.product((4, 8), (True, False))
    ),
    (ct("pack-quantized", num_bits=4, strategy="group", group_size=64, actorder="group"), None),
]


@pytest.mark.parametrize(("config", "rounding"), CT, ids=range(len(CT)))
def test_compressed_tensors(
    config: Config, rounding: Rounding | None, engine: dict[str, Any], tmp_path: Path
) -> None:
    check(tmp_path, config, lambda weight: make_ct(config, weight), engine, rounding)


def test_inputs_that_are_not_rounded_would_be_found(engine: dict[str, Any], tmp_path: Path) -> None:
    """The reference without the rounding is far away."""
    for config in (CT[0][0], CT[5][0]):
        made = quantize(
            tmp_path, config, everything(lambda weight, config=config: make_ct(config, weight))
        )
        found = errors(made, **engine)
        assert found[len(found) // 2] > 20 * ROUNDING


# Layers that are stored in different ways.


def test_one_checkpoint_that_mixes_formats(engine: dict[str, Any], tmp_path: Path) -> None:
    mlp, attention = CT[10][0], CT[3][0]
    groups = {
        "mlp": mlp["config_groups"]["group_0"] | {"targets": ["re:.*mlp.*"]},
        "all": attention["config_groups"]["group_0"],
    }
    config = ct("mixed-precision") | {
        "config_groups": groups,
        "ignore": ["lm_head", "model.layers.1.self_attn.o_proj"],
    }
    rules: list[tuple[str, Make | None]] = [
        ("*.mlp.*", lambda weight: make_ct(mlp, weight)),
        ("model.layers.1.self_attn.o_proj", None),
        *everything(lambda weight: make_ct(attention, weight)),
    ]
    made = quantize(tmp_path, config, rules)
    assert made.tensors["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    assert made.tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert made.tensors["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float32
    assert errors(made, **engine)[-1] < ROUNDING


def test_rules_of_the_user_for_layers_that_the_checkpoint_leaves_out(
    engine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The MLP as GPTQ from the checkpoint, attention as int8 on the fly, the output projection
    plain."""
    from int8_plugin import Int8

    install(tmp_path / "site", "int8_plugin", "kit8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": False,
        "desc_act": False,
        "dynamic": {r"-:.*self_attn": {}},
    }

    def on_the_fly(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"weight": weight.clone()}, Int8.dequantize(
            Int8, None, Int8.quantize(Int8, None, weight)
        )  # type: ignore[arg-type]

    rules: list[tuple[str, Make | None]] = [
        ("*.mlp.*", lambda weight: make_gptq(config, weight)),
        ("*.self_attn.*", on_the_fly),
    ]
    made = quantize(tmp_path / "model", config, rules)
    quantization = [{"match": "*.self_attn.*", "use": "kit8"}, {"match": "lm_head", "use": "none"}]
    assert errors(made, quantization=quantization, **engine)[-1] < ROUNDING
    assert errors(made, **engine)[-1] > ROUNDING  # attention as it is


def test_scales_of_a_cache_that_is_not_rounded(engine: dict[str, Any], tmp_path: Path) -> None:
    """They are passed over."""
    config = CT[3][0] | {
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    }
    made = quantize(tmp_path, config, everything(lambda weight: make_ct(config, weight)))
    for layer in range(SIZES["num_hidden_layers"]):
        made.tensors |= {
            f"model.layers.{layer}.self_attn.{which}_scale": torch.tensor([0.5]) for which in "kv"
        }
    made.save()
    assert errors(made, **engine)[-1] < ROUNDING


def test_biases_of_zeros_that_tools_wrote(engine: dict[str, Any], tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
    made = quantize(tmp_path, config, everything(lambda weight: make_gptq(config, weight)))
    made.tensors["model.layers.0.mlp.down_proj.bias"] = torch.zeros(SIZES["hidden_size"])
    made.save()
    assert errors(made, **engine)[-1] < ROUNDING
