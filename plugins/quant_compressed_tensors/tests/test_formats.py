"""Test that checkpoints are read bit for bit, both those packed by the library and those packed
here."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from ct_packers import make, words, words_one_by_one
from torch import Tensor

from dovetail.errors import CheckpointError, ConfigError
from dovetail.interfaces.quantization import Declined, LinearLayer, Part
from dovetail_quant_compressed_tensors import BY_TOKEN, EXAMPLES, FLOAT, INT, NIBBLE, example
from dovetail_quant_compressed_tensors.scheme import CompressedTensors
from dovetail_testing.layers import as_read, fill

NO_MATMUL: Any = None
NAME = "model.layers.0.mlp.down_proj"
STATIC = {"strategy": "tensor", "dynamic": False}
GROUPS = {"strategy": "group", "group_size": 32}
CHANNELS = {"strategy": "channel"}


def layer(outs: int, inputs: int, name: str = NAME) -> LinearLayer:
    return LinearLayer(name, (Part(name, outs),), inputs, False, "float32")


def scheme_of(config: dict[str, Any]) -> CompressedTensors:
    return CompressedTensors(NO_MATMUL, config, "model/config.json")


def read(config: dict[str, Any], one: LinearLayer, parts: list[dict[str, Tensor]]) -> Tensor:
    scheme = scheme_of(config)
    declared = scheme.parameters(one)
    assert isinstance(declared, dict)
    return scheme.dequantize(one, fill(one, declared, [as_read(declared, part) for part in parts]))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_packers_agree(bits: int) -> None:
    numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 61))
    assert words(numbers, bits).tolist() == words_one_by_one(numbers.tolist(), bits)


@pytest.mark.parametrize("config", EXAMPLES, ids=range(len(EXAMPLES)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_read_bit_for_bit(config: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, plain = make(config, torch.randn(128, 256), dtype)
    assert torch.equal(read(config, layer(128, 256), [tensors]), plain)


@pytest.mark.parametrize("config", [c for c in EXAMPLES if "actorder" not in str(c)])
def test_outputs_and_inputs_that_fill_no_word_or_block(config: dict[str, Any]) -> None:
    tensors, plain = make(config, torch.randn(61, 100))
    assert torch.equal(read(config, layer(61, 100), [tensors]), plain)


@pytest.mark.parametrize("config", [c for c in EXAMPLES if "actorder" not in str(c)])
def test_parts_with_scales_of_their_own(config: dict[str, Any]) -> None:
    made = [
        make(config, torch.randn(outs, 96) * size)
        for outs, size in ((61, 1.0), (24, 7.0), (8, 0.1))
    ]
    fused = LinearLayer("qkv", (Part("q", 61), Part("k", 24), Part("v", 8)), 96, False, "float32")
    found = read(config, fused, [tensors for tensors, _ in made])
    assert torch.equal(found, torch.cat([plain for _, plain in made]))


# The library's own compressors.

LIBRARY = [
    ("float-quantized", FLOAT | CHANNELS, FLOAT | BY_TOKEN),
    ("float-quantized", FLOAT | {"strategy": "tensor"}, FLOAT | STATIC),
    ("float-quantized", FLOAT | {"strategy": "block", "block_structure": [32, 64]}, None),
    ("naive-quantized", FLOAT | CHANNELS, None),
    ("naive-quantized", INT | CHANNELS, None),
    ("int-quantized", INT | CHANNELS, INT | BY_TOKEN),
    ("int-quantized", NIBBLE | GROUPS | {"symmetric": True}, INT | BY_TOKEN),
    ("int-quantized", INT | {"strategy": "tensor"}, INT | STATIC),
    ("int-quantized", INT | GROUPS, INT | BY_TOKEN),
    ("int-quantized", INT | CHANNELS | {"symmetric": False}, INT | BY_TOKEN),
    *(
        ("pack-quantized", NIBBLE | {"num_bits": bits, "symmetric": symmetric} | strategy, None)
        for bits, symmetric, strategy in itertools.product(
            (4, 8), (True, False), (GROUPS, CHANNELS)
        )
    ),
    ("pack-quantized", NIBBLE | GROUPS | {"symmetric": True}, INT | BY_TOKEN),
]


def test_every_format_is_tried_with_the_library() -> None:
    assert {format for format, _, _ in LIBRARY} >= {config["format"] for config in EXAMPLES}


@pytest.mark.parametrize(("format", "weights", "inputs"), LIBRARY)
@pytest.mark.parametrize("sizes", [(128, 256), (40, 96)])
def test_what_the_library_packs_is_read_bit_for_bit(
    format: str, weights: dict[str, Any], inputs: dict[str, Any] | None, sizes: tuple[int, int]
) -> None:
    """Compares with the library's own unpacking, in float32, and with its integers."""
    if weights["strategy"] == "block":
        sizes = (sizes[0], 128)  # the library does not support blocks with fewer inputs
    config = example(format, weights, inputs)
    scales = library_scales(config, weight := torch.randn(sizes))
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress({"weight": weight, **scales}, scheme)
    expected = compressor.decompress(packed, scheme)["weight"]
    stored = {name: tensor for name, tensor in packed.items() if name != "input_zero_point"}
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        stored["input_scale"] = torch.tensor([0.02])
    found = read(config, layer(*sizes), [stored])
    assert torch.equal(found, expected)


def library_scales(config: dict[str, Any], weight: Tensor) -> dict[str, Tensor]:
    """Return scales (and zero points) of a weight from the packer here, in the library's shapes and
    unpacked."""
    group = {**config["config_groups"]["group_0"], "format": "int-quantized"}
    tensors, _ = make(config | {"config_groups": {"g": group}}, weight, torch.float32)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name in ("weight_scale", "weight_zero_point")
    }


# Which layer belongs to which group.


def test_targets_and_ignored_layers() -> None:
    config = {
        "format": "mixed-precision",
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": INT | CHANNELS, "format": "int-quantized"},
            "b": {
                "targets": ["re:.*mlp.*"],
                "weights": NIBBLE | GROUPS,
                "format": "pack-quantized",
            },
            "c": {
                "targets": ["model.layers.1.mlp.down_proj"],
                "weights": FLOAT | CHANNELS,
                "format": "float-quantized",
            },
        },
        "ignore": ["lm_head", "re:.*layers\\.7.*"],
    }
    config["config_groups"] = dict(list(config["config_groups"].items())[::-1])  # type: ignore[attr-defined]
    scheme = scheme_of(config)
    expected = {
        "model.layers.0.self_attn.o_proj": "int8",
        "model.layers.0.mlp.down_proj": "uint4",
        "model.layers.1.mlp.down_proj": "float8_e4m3fn",
    }
    assert {name: scheme.format(layer(64, 64, name)).codes for name in expected} == expected
    for name in ("lm_head", "model.layers.7.mlp.down_proj"):
        assert isinstance(scheme.parameters(layer(64, 64, name)), Declined)
    parts = Part("model.layers.0.mlp.up_proj", 8), Part("model.layers.0.self_attn.q_proj", 8)
    fused = LinearLayer("fused", parts, 64, False, "float32")
    with pytest.raises(ConfigError, match="config_groups and ignore"):
        scheme.parameters(fused)


def test_inputs_are_rounded_as_the_group_says() -> None:
    def format_of(
        format: str, weights: dict[str, Any], inputs: dict[str, Any] | None
    ) -> tuple[str | None, bool]:
        found = scheme_of(example(format, weights, inputs)).format(layer(64, 64))
        return found.inputs, found.input_scale

    assert format_of("float-quantized", FLOAT | CHANNELS, FLOAT | BY_TOKEN) == (
        "float8_e4m3fn",
        False,
    )
    assert format_of("float-quantized", FLOAT | CHANNELS, FLOAT | STATIC) == ("float8_e4m3fn", True)
    assert format_of("int-quantized", INT | CHANNELS, INT | BY_TOKEN) == ("int8", False)
    assert format_of("pack-quantized", NIBBLE | GROUPS, INT | BY_TOKEN) == ("int8", False)
    assert format_of("pack-quantized", NIBBLE | GROUPS, None) == (None, False)
    block, by_group = (
        FLOAT | {"strategy": "block"},
        FLOAT | {"strategy": "group", "group_size": 128, "dynamic": True},
    )
    assert format_of("float-quantized", block, by_group) == (None, False)
    assert format_of("int-quantized", INT | CHANNELS, INT | BY_TOKEN | {"symmetric": False}) == (
        None,
        False,
    )


def test_scales_of_the_cache() -> None:
    config = EXAMPLES[0] | {"kv_cache_scheme": FLOAT | STATIC}
    found = scheme_of(config).kv_scales("model.layers.1.self_attn")
    assert found is not None
    assert list(found) == ["model.layers.1.self_attn.k_scale", "model.layers.1.self_attn.v_scale"]
    assert scheme_of(config).unused == ("*.k_scale", "*.v_scale")
    assert scheme_of(EXAMPLES[0]).kv_scales("model.layers.1.self_attn") is None
    with pytest.raises(CheckpointError, match=r"kv_cache_scheme is .*attn_head.*per tensor"):
        scheme_of(EXAMPLES[0] | {"kv_cache_scheme": FLOAT | {"strategy": "attn_head"}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"format": "pack-quantized"},
            r"model/config\.json: quantization_config\.config_groups is None; it must have",
        ),
        (
            example("nvfp4-pack-quantized", NIBBLE),
            r"group_0\.format is 'nvfp4-pack-quantized'; supported: float-",
        ),
        (
            example("pack-quantized", NIBBLE | {"num_bits": 3}),
            r"weights is 'int of 3 bits'; pack-quantized is supported with",
        ),
        (
            example("float-quantized", INT | CHANNELS),
            r"weights is 'int of 8 bits'; float-quantized is supported with",
        ),
        (
            example("pack-quantized", NIBBLE | {"strategy": "tensor_group"}),
            r"strategy is 'tensor_group'; pack-quantized",
        ),
        (
            example("pack-quantized", NIBBLE | {"strategy": "group"}),
            r"weights\.group_size is None; it must be a number",
        ),
        (
            example("int-quantized", INT | CHANNELS, FLOAT | BY_TOKEN),
            r"input_activations is 'float of 8 bits'; with these",
        ),
        (example("int-quantized", INT | {"strategy": "block"}), r"weights\.strategy is 'block'"),
        (
            example("int-quantized", INT | {"strategy": "tensor", "symmetric": False}),
            r"weights\.symmetric is False",
        ),
        (
            example("float-quantized", FLOAT | {"strategy": "block", "block_structure": "128"}),
            r"weights\.block_structure is '128'; it must be two numbers",
        ),
        (
            EXAMPLES[0] | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            r"quantization_config\.sparsity_config",
        ),
        (
            EXAMPLES[0] | {"transform_config": {"config_groups": {"R1": {}}}},
            r"quantization_config\.transform_config",
        ),
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        scheme_of(config)


def test_a_shape_and_an_order_that_do_not_fit() -> None:
    config = example("pack-quantized", NIBBLE | GROUPS)
    tensors, _ = make(config, torch.randn(16, 64))
    with pytest.raises(
        CheckpointError,
        match=r"down_proj\.weight_shape is \[16, 60\], but the model's weight has shape \[16, 64\]",
    ):
        read(config, layer(16, 64), [{**tensors, "weight_shape": torch.tensor([16, 60])}])
    ordered = example("pack-quantized", NIBBLE | GROUPS | {"actorder": "group"})
    tensors, _ = make(ordered, torch.randn(16, 64))
    broken = {**tensors, "weight_g_idx": torch.zeros(64, dtype=torch.int32)}
    with pytest.raises(
        CheckpointError, match=r"weight_g_idx does not have 32 inputs in each of 2 groups"
    ):
        read(ordered, layer(16, 64), [broken])
