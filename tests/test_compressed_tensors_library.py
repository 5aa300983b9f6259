"""Whole checkpoints that the compressed-tensors library writes, beside the model that the library
unpacks again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from quantized import SIZES, Quantized, errors
from torch import Tensor

WEIGHTS_ONLY = 1e-4
ROUNDED_FLOATS = 1e-4
ROUNDED_INTS = 0.05
"""The library's scale of an int8 input is its largest value over 127.5; vLLM's, and ours, over
127."""


def grouped(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """[…, weights that share a scale]"""
    outs, inputs = weight.shape
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    if args.strategy == "group":
        return weight.reshape(outs, -1, args.group_size or inputs)
    if args.strategy == "block":
        assert args.block_structure is not None
        rows, columns = args.block_structure
        filled = torch.nn.functional.pad(weight, (0, 0, 0, -outs % rows))
        return filled.reshape(-1, rows, inputs // columns, columns).transpose(1, 2).flatten(2)
    return weight[:, None]


def write(folder: Path, preset: str) -> Quantized:
    """Quantize to the nearest and save; the model is unpacked again, and rounds inputs as the
    library does."""
    seed = random.randrange(2**31)
    print(f"weights from seed {seed}")
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    )
    for layer in (layer for layer in model.modules() if hasattr(layer, "quantization_scheme")):
        values = grouped(layer.weight.data, layer.quantization_scheme.weights)
        made = calculate_qparams(
            values.amin(-1), values.amax(-1), layer.quantization_scheme.weights
        )
        for name, tensor in zip(("weight_scale", "weight_zero_point"), made, strict=True):
            if hasattr(layer, name):
                kept = getattr(layer, name)
                kept.data.copy_(tensor.reshape(kept.shape))
        if hasattr(layer, "input_scale"):
            layer.input_scale.data.fill_(4 / 448)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return Quantized(folder, model, {}, {})


@pytest.mark.parametrize(
    ("preset", "limit"),
    [
        ("W4A16", WEIGHTS_ONLY),
        ("W4A16_ASYM", WEIGHTS_ONLY),
        ("W8A16", WEIGHTS_ONLY),
        ("W8A8", ROUNDED_INTS),
        ("W4A8", ROUNDED_INTS),
        ("FP8_DYNAMIC", ROUNDED_FLOATS),
        ("FP8", ROUNDED_FLOATS),
        ("FP8_BLOCK", 0.15),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_the_library_saves(preset: str, limit: float, tmp_path: Path) -> None:
    """By the median prompt, where inputs are rounded: one in many has an input that falls to
    another code."""
    made = write(tmp_path, preset)
    found = errors(made, attention="auto", matmul="auto")
    assert found[len(found) // 2] < limit
