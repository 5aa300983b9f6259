"""Test the scheme against the contract. Checkpoints are written as the format is documented, block
by block."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dovetail.errors import CheckpointError, ConfigError
from dovetail.facts import device_facts
from dovetail.interfaces.quantization import LinearLayer, Part
from dovetail.plugin.provider import Context
from dovetail_quant_fp8 import PROVIDER, Fp8Options
from dovetail_quant_fp8.scheme import Fp8
from dovetail_testing.contract import KIT_MODEL
from dovetail_testing.matmul import KitMatmul
from dovetail_testing.quantization import QuantizationContract

Config = dict[str, Any]


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and their scale []."""
    scale = weight.abs().amax() / 448
    return (weight / scale.clamp_min(1e-12)).to(torch.float8_e4m3fn), scale


def pack(config: Config, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
    ours, theirs = (
        ("_inv", "activation_scale") if "weight_block_size" in config else ("", "input_scale")
    )
    codes, scale = rounded(weight)
    if block := config.get("weight_block_size"):
        rows, columns = (
            range(0, size, unit) for size, unit in zip(weight.shape, block, strict=True)
        )
        scale = torch.empty(len(rows), len(columns))
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                where = slice(row, row + block[0]), slice(column, column + block[1])
                codes[where], scale[i, j] = rounded(weight[where])
    if config.get("scale_fmt") == "ue8m0":
        exponents = scale.clamp_min(2.0**-126).log2().ceil()
        spread = (
            (2.0**exponents)
            .repeat_interleave(128, 0)
            .repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        )
        codes, scale = (
            (weight / spread).to(torch.float8_e4m3fn),
            (2.0**exponents).to(torch.float8_e8m0fnu),
        )
    static = {theirs: torch.tensor(0.01)} if config["activation_scheme"] == "static" else {}
    return {"weight": codes, f"weight_scale{ours}": scale, **static}


class TestFp8(QuantizationContract):
    """Tests the configs of checkpoints with default options."""

    provider = PROVIDER
    pack = pack
    declined = ("lm_head",)


class TestPowersOfTwo(QuantizationContract):
    """Tests one-byte scales, which newer checkpoints have."""

    provider = PROVIDER
    pack = pack
    configs: ClassVar = (PROVIDER.capabilities.examples[0] | {"scale_fmt": "ue8m0"},)


class TestBlocks(QuantizationContract):
    provider = PROVIDER
    configs = PROVIDER.capabilities.examples[:1]
    options: ClassVar = {"granularity": "block", "activations": "dynamic"}


class TestTensor(QuantizationContract):
    provider = PROVIDER
    configs = PROVIDER.capabilities.examples[2:3]
    options: ClassVar = {"granularity": "tensor", "activations": "none"}


BLOCK, _, TENSOR, STATIC, _ = PROVIDER.capabilities.examples


def context(config: Config | None, device: str = "cpu") -> Context:
    return Context(
        device_facts(), replace(KIT_MODEL, quantization_config=config), device, "float32"
    )


@pytest.mark.parametrize(
    ("config", "asked", "settled"),
    [
        (None, {}, ("channel", "none")),
        (None, {"granularity": "block"}, ("block", "none")),
        (None, {"activations": "dynamic"}, ("channel", "dynamic")),
        (BLOCK, {}, ("block", "none")),
        (TENSOR, {}, ("tensor", "dynamic")),
        (STATIC, {}, ("tensor", "static")),
        (STATIC, {"activations": "dynamic"}, ("tensor", "dynamic")),
    ],
)
def test_what_is_left_open(config: Config | None, asked: Config, settled: tuple[str, str]) -> None:
    options, _ = PROVIDER.resolve_options(context(config), Fp8Options(**asked))
    assert options.model_dump() == dict(zip(("granularity", "activations"), settled, strict=True))


def test_inputs_are_rounded_where_that_may_pay() -> None:
    options, _ = PROVIDER.resolve_options(context(None, "cuda:0"), Fp8Options())
    assert options.activations == "dynamic"


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        (
            BLOCK,
            {"granularity": "channel"},
            "'channel' is requested, but the checkpoint has one scale per block",
        ),
        (
            TENSOR,
            {"granularity": "block"},
            "'block' is requested, but the checkpoint has one scale per tensor",
        ),
        (TENSOR, {"activations": "static"}, "the checkpoint has no activation scales"),
        (None, {"activations": "static"}, "the checkpoint has no activation scales"),
    ],
)
def test_what_does_not_go_with_the_checkpoint(
    config: Config | None, asked: Config, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PROVIDER.resolve_options(context(config), Fp8Options(**asked))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"weight_block_size": [128]},
            r"weight_block_size is [128] (supported: two sizes or null)",
        ),
        (
            {"weight_block_size": [0, 128]},
            r"weight_block_size is [0, 128] (supported: two sizes or null)",
        ),
        (
            {"activation_scheme": "token"},
            "activation_scheme is 'token' (supported: dynamic or static)",
        ),
        ({"scale_fmt": "ue5m3"}, "scale_fmt is 'ue5m3' (supported: float or ue8m0)"),
    ],
)
def test_what_is_not_read(changes: Config, reason: str) -> None:
    (found,) = PROVIDER.why_not(context(BLOCK | changes))
    assert reason in str(found)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        *(
            ("weight_scale_inv", wrong, "are negative, infinite or NaN")
            for wrong in (torch.nan, torch.inf, -1.0)
        ),
        *(
            ("activation_scale", wrong, "are zero, negative, infinite or NaN")
            for wrong in (torch.nan, torch.inf, -1.0, 0.0)
        ),
    ],
)
def test_scales_that_are_none(name: str, wrong: float, message: str) -> None:
    layer = LinearLayer("kit", (Part("kit", 2),), 4, False, "float32")
    scheme = Fp8(KitMatmul(), STATIC, Fp8Options(granularity="tensor", activations="static"))
    declared = scheme.parameters(layer)
    assert isinstance(declared, dict)
    with pytest.raises(CheckpointError, match=rf"kit\.{name} has the value {wrong} .*{message}"):
        declared[name].check(f"kit.{name}", torch.tensor(wrong))
    declared["weight_scale_inv"].check("of zeros", torch.tensor(0.0))
