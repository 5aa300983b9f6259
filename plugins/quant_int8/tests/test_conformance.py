"""Test both schemes against the contract, the handling of outliers, and rejected configs."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.facts import device_facts
from dovetail.interfaces.quantization import LinearLayer, Part
from dovetail.plugin.provider import Context
from dovetail_quant_int8 import BITSANDBYTES, EXAMPLE, INT8
from dovetail_quant_int8.bitsandbytes import BitsAndBytes, check_row_major
from dovetail_testing.contract import KIT_MODEL
from dovetail_testing.matmul import KitMatmul
from dovetail_testing.quantization import QuantizationContract

Config = dict[str, Any]


def pack(config: Config, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
    largest = weight.abs().max(1).values
    codes = torch.round(weight * 127 / torch.where(largest == 0, 1, largest)[:, None])
    return {"weight": codes.to(torch.int8), "SCB": largest}


class TestInt8(QuantizationContract):
    provider = INT8


class TestWeightOnly(QuantizationContract):
    provider = INT8
    options: ClassVar = {"activations": "none"}


class TestBitsAndBytes(QuantizationContract):
    provider = BITSANDBYTES
    pack = pack
    configs = (EXAMPLE, EXAMPLE | {"llm_int8_skip_modules": ["model.layers.9"]})
    declined = ("lm_head",)


class TestAllOutliers(QuantizationContract):
    """Tests a threshold that makes every nonzero input an outlier."""

    provider = BITSANDBYTES
    options: ClassVar = {"threshold": 1e-30}


def made(threshold: float, bias: Tensor | None) -> tuple[Any, Tensor]:
    """Return a layer, which is always the same, and its weight."""
    scheme = BitsAndBytes(KitMatmul(), {}, threshold)
    layer = LinearLayer("kit", (Part("kit", 40),), 64, bias is not None, "float32", stored=False)
    tensors = scheme.quantize(
        layer, torch.randn(40, 64, generator=torch.Generator().manual_seed(4))
    )
    weight = scheme.dequantize(layer, tensors)
    return scheme.linear(layer, tensors | ({} if bias is None else {"bias": bias})), weight


@pytest.mark.parametrize("bias", [None, torch.linspace(-3, 3, 40)], ids=["no bias", "bias"])
def test_outliers_are_not_rounded_to_8_bits(bias: Tensor | None) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    x[1, 7], x[3, 9], x[3, 60] = 100.0, -80.0, 6.0
    (plain, weight), (mixed, _) = made(0.0, bias), made(6.0, bias)
    small = torch.where(x.abs() < 6, x, 0)
    step = (
        torch.maximum(
            small.abs().amax(1, keepdim=True), (x - small).abs().amax(1, keepdim=True) / 254
        )
        / 127
    )
    left = 0.5 * step * weight.abs().sum(1)
    exact = x @ weight.T + (0 if bias is None else bias)
    assert ((mixed(x) - exact).abs() <= left + 1e-4).all()
    # With a step of 100 / 127, the row's other inputs are nearly lost.
    assert (plain(x) - exact)[1].norm() > 10 * (mixed(x) - exact)[1].norm()


def test_a_row_does_not_depend_on_the_others() -> None:
    x = torch.randn(6, 64)
    x[::2] *= 8
    multiply, _ = made(6.0, torch.randn(40))
    whole = multiply(x)
    for i in range(6):
        torch.testing.assert_close(multiply(x[i : i + 1])[0], whole[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"},
            "4-bit weights (nf4)",
        ),
        ({"load_in_8bit": False}, "neither load_in_8bit nor load_in_4bit"),
        ({"llm_int8_has_fp16_weight": True}, "16-bit"),
        ({"llm_int8_threshold": "6"}, "llm_int8_threshold is '6'"),
    ],
)
def test_what_is_refused(changes: Config, reason: str) -> None:
    model = replace(KIT_MODEL, quantization_config=EXAMPLE | changes)
    (found,) = BITSANDBYTES.why_not(Context(device_facts(), model, "cpu", "float32"))
    assert reason in str(found)


def test_tiles_for_a_gpu_are_refused(tmp_path: Path) -> None:
    tensors = {
        "l.weight": torch.zeros(4, 4, dtype=torch.int8),
        "l.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    check_row_major(tmp_path)
    save_file(
        tensors | {"l.weight_format": torch.tensor(2, dtype=torch.uint8)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError,
        match=r"according to l\.weight_format, the weight is stored in a GPU's tile",
    ):
        check_row_major(tmp_path)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none(wrong: float) -> None:
    layer = LinearLayer("kit", (Part("kit", 2),), 4, False, "float32")
    declared = BitsAndBytes(KitMatmul(), {}, 6.0).parameters(layer)
    assert isinstance(declared, dict)
    declared["SCB"].check("of a row of zeros", torch.tensor([1.0, 0.0]))
    with pytest.raises(
        CheckpointError,
        match=rf"kit\.SCB has the value {wrong} at \[1\], and 1 of its 2 scales are negative",
    ):
        declared["SCB"].check("kit.SCB", torch.tensor([1.0, wrong]))
