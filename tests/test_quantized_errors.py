"""Quantized checkpoints that are broken, or not what the configuration takes them for: what is
wrong, where, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from awq_gptq_packers import make_awq, make_gptq
from ct_packers import make as make_ct
from quantized import Quantized, next_tokens, quantize

from dovetail.composition.quantization import SUPPLIERS
from dovetail.composition.resolution import resolve
from dovetail.errors import CheckpointError, ConfigError, PluginError
from dovetail.plugin.config import load_config
from dovetail.plugin.discovery import load_registry
from dovetail_testing.plugin import install

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": None,
            "format": "float-quantized",
        }
    },
}
MAKERS: dict[str, Any] = {"gptq": make_gptq, "awq": make_awq, "compressed-tensors": make_ct}
NAME = "model.layers.1.mlp.down_proj"


def made_of(folder: Path, config: dict[str, Any]) -> Quantized:
    return quantize(
        folder,
        config,
        [("lm_head", None), ("*", lambda weight: MAKERS[config["quant_method"]](config, weight))],
    )


def refusal(made: Quantized, kind: type[Exception] = CheckpointError, **values: Any) -> str:
    made.save()
    with pytest.raises(kind) as raised:
        next_tokens(made.folder, matmul="torch", **values)
    return str(raised.value)


@pytest.mark.parametrize(
    ("config", "tensor"),
    [(GPTQ, "qweight"), (GPTQ, "qzeros"), (AWQ, "qweight"), (AWQ, "scales"), (FP8, "weight")],
)
def test_packed_tensors_of_another_shape(
    config: dict[str, Any], tensor: str, tmp_path: Path
) -> None:
    made = made_of(tmp_path, config)
    whole = made.tensors[f"{NAME}.{tensor}"]
    made.tensors[f"{NAME}.{tensor}"] = whole[:-1].clone()
    said = refusal(made)
    assert (
        f"{tmp_path / 'model.safetensors'}: {NAME}.{tensor} has shape {list(whole[:-1].shape)}"
        in said
    )
    assert f"asks for {list(whole.shape)}" in said
    assert f'quantization_config {{"quant_method": "{config["quant_method"]}"' in said


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    made = made_of(tmp_path, GPTQ)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"
    ):
        next_tokens(made.folder)


@pytest.mark.parametrize(("config", "wrong"), [(GPTQ, 32), (GPTQ, 128), (AWQ, 128)])
def test_another_group_size(config: dict[str, Any], wrong: int, tmp_path: Path) -> None:
    made = made_of(tmp_path, config)
    made.config["quantization_config"] = config | {"group_size": wrong}
    said = refusal(made)
    assert "has shape" in said
    assert f'"group_size": {wrong}' in said
    assert "of config.json asks for" in said
    assert "is it the config that it was made with" in said


@pytest.mark.parametrize(
    ("config", "tensor"), [(GPTQ, "scales"), (AWQ, "qzeros"), (FP8, "weight_scale")]
)
def test_missing_tensors(config: dict[str, Any], tensor: str, tmp_path: Path) -> None:
    made = made_of(tmp_path, config)
    del made.tensors[f"{NAME}.{tensor}"]
    said = refusal(made)
    assert f"{tmp_path} lacks {NAME}.{tensor}, which quantization_config {{" in said


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("config", "tensor"), [(GPTQ, "scales"), (AWQ, "scales"), (FP8, "weight_scale")]
)
def test_scales_that_are_none(
    config: dict[str, Any], tensor: str, value: float, tmp_path: Path
) -> None:
    made = made_of(tmp_path, config)
    scales = made.tensors[f"{NAME}.{tensor}"]
    scales.view(-1)[3] = value
    said = refusal(made)
    where = (
        torch.zeros_like(scales)
        .view(-1)
        .index_fill(0, torch.tensor([3]), 1)
        .view_as(scales)
        .nonzero()[0]
        .tolist()
    )
    assert (
        f"{tmp_path / 'model.safetensors'}: {NAME}.{tensor} has the value {value} at {where},"
        f" and 1 of its {scales.numel()} scales" in said
    )
    assert "quantize it again" in said


def test_a_layer_that_is_stored_plain(tmp_path: Path) -> None:
    made = quantize(
        tmp_path,
        GPTQ,
        [("lm_head", None), (NAME, None), ("*", lambda weight: make_gptq(GPTQ, weight))],
    )
    said = refusal(made)
    assert f"{tmp_path}: {NAME} is stored as a plain weight, and quantization_config" in said
    assert "asks for qweight, qzeros, scales, g_idx" in said


def test_a_layer_that_is_stored_quantized(tmp_path: Path) -> None:
    made = made_of(tmp_path, FP8)
    made.config["quantization_config"] = FP8 | {"ignore": ["lm_head", NAME]}
    said = refusal(made)
    assert (
        f"{tmp_path}: {NAME} is stored quantized (weight, weight_scale), and quantization_config"
        in said
    )
    assert "leaves it out" in said


def test_a_rule_that_disagrees_with_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error shows both."""
    install(tmp_path / "site", "int8_plugin", "kit8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    made = made_of(tmp_path / "model", GPTQ)
    for use in ("none", "kit8"):
        said = refusal(made, ConfigError, quantization=[{"match": "*.mlp.*", "use": use}])
        assert (
            f"quantization.0: the rule {{match: '*.mlp.*', use: {use}}} and the checkpoint"
            f" {made.folder} disagree" in said
        )
        assert "is stored quantized (g_idx, qweight, qzeros, scales)" in said
        assert '"group_size": 64' in said
        assert "Remove the rule" in said


def test_options_that_the_checkpoint_decides(tmp_path: Path) -> None:
    made = made_of(tmp_path, GPTQ)
    said = refusal(made, ConfigError, quantization={"use": "gptq", "group_size": 128})
    assert "quantization.group_size: Extra inputs are not permitted" in said
    assert f"The checkpoint {tmp_path} declares quantization_config {{" in said
    assert '"group_size": 64' in said


def test_a_scheme_asked_for_on_a_model_quantized_with_another(tmp_path: Path) -> None:
    made = made_of(tmp_path, GPTQ)
    said = refusal(made, PluginError, quantization="awq")
    assert (
        "quantization: 'awq' cannot be used here: the checkpoint is quantized with gptq (reads"
        " awq). Usable: gptq." in said
    )


def test_a_method_that_nobody_reads(tmp_path: Path) -> None:
    made = made_of(tmp_path, GPTQ)
    made.config["quantization_config"] = GPTQ | {"quant_method": "gptq-marlin"}
    said = refusal(made, PluginError)
    assert (
        f"the weights of {tmp_path} are quantized with 'gptq-marlin', which no installed plugin"
        " reads" in said
    )
    assert "Similar: gptq (dovetail-quant-awq-gptq:gptq)" in said


@pytest.mark.parametrize(("method", "package"), SUPPLIERS.items())
def test_a_method_whose_package_is_not_installed(method: str, package: str, tmp_path: Path) -> None:
    registry = load_registry()
    registry.offers[:] = [o for o in registry.offers if o.plugin.distribution != package]
    made = made_of(tmp_path, GPTQ)
    for given, advice in (
        (method, f"Install one: pip install {package}"),
        (f"{method}x", f"{method!r} is meant: pip install {package}"),
    ):
        made.config["quantization_config"] = GPTQ | {"quant_method": given}
        made.save()
        with pytest.raises(PluginError) as raised:
            resolve(load_config(model=str(tmp_path), device="cpu"), registry)
        assert advice in str(raised.value)


def test_packages_are_named_after_what_they_read() -> None:
    """The table for errors, beside what the installed ones of them declare."""
    declared = {
        method: offer.plugin.distribution
        for offer in load_registry().of("quantization")
        if offer.plugin.distribution.startswith("dovetail-quant-")
        for method in offer.provider.capabilities.methods  # type: ignore[attr-defined]
    }
    assert declared.items() <= {"none": declared.get("none"), **SUPPLIERS}.items()
    assert {"awq", "gptq", "compressed-tensors"} <= declared.keys()
