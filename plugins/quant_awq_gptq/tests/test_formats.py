"""Test that checkpoints are read bit for bit, and which configurations are rejected."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from awq_gptq_packers import AWQ_ORDER, make_awq, make_gptq, words, words_one_by_one
from torch import Tensor

from dovetail.errors import CheckpointError, ConfigError
from dovetail.interfaces.packing import unpack
from dovetail.interfaces.quantization import Declined, LinearLayer, Part, Scheme
from dovetail_quant_awq_gptq.awq import INTERLEAVED, Awq
from dovetail_quant_awq_gptq.gptq import Gptq
from dovetail_testing.layers import as_read, fill

AWQ = {"bits": 4, "group_size": 64}
GPTQ = {"bits": 4, "group_size": 64, "sym": False, "desc_act": False}
NO_MATMUL: Any = None


def layer(outs: int, inputs: int, name: str = "model.layers.0.mlp.down_proj") -> LinearLayer:
    return LinearLayer(name, (Part(name, outs),), inputs, False, "float32")


def read(scheme: Scheme, one: LinearLayer, parts: list[dict[str, Tensor]]) -> Tensor:
    declared = scheme.parameters(one)
    assert isinstance(declared, dict)
    return scheme.dequantize(one, fill(one, declared, [as_read(declared, part) for part in parts]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("minus", [0, 1])
def test_the_packers_agree(bits: int, minus: int) -> None:
    numbers = torch.randint(0, 2**bits, (5, 64))
    assert words(numbers, bits, minus).tolist() == words_one_by_one(numbers.tolist(), bits, minus)


@pytest.mark.parametrize(("bits", "axis"), [(4, 0), (4, 1), (8, 0), (8, 1)])
def test_unpacking(bits: int, axis: int) -> None:
    codes = torch.randint(0, 2**bits, (64, 32), dtype=torch.uint8)
    by_hand = words(codes if axis else codes.T, bits)
    assert torch.equal(unpack(by_hand if axis else by_hand.T, bits, axis), codes)


def test_the_interleaved_order() -> None:
    """Check the column of each code by hand: a word's eight codes are those of columns 0, 2, 4, 6,
    1, 3, 5, 7."""
    assert list(INTERLEAVED) == AWQ_ORDER
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    assert unpack(word, 4, 1, INTERLEAVED).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
def test_awq_is_read_bit_for_bit(group: int) -> None:
    config = AWQ | {"group_size": group}
    tensors, plain = make_awq(config, torch.randn(48, 256))
    assert torch.equal(
        read(Awq(NO_MATMUL, config, "config.json"), layer(48, 256), [tensors]), plain
    )


MATRIX = list(
    itertools.product((4, 8), (-1, 32, 64, 128), (True, False), (True, False), ("gptq", "gptq_v2"))
)


@pytest.mark.parametrize(("bits", "group", "symmetric", "ordered", "version"), MATRIX)
def test_gptq_is_read_bit_for_bit(
    bits: int, group: int, symmetric: bool, ordered: bool, version: str
) -> None:
    config = {
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": ordered,
        "checkpoint_format": version,
    }
    tensors, plain = make_gptq(config, torch.randn(48, 256) + 0.3)
    found = read(Gptq(NO_MATMUL, config, "config.json"), layer(48, 256), [tensors])
    # In an order, a scale and a zero point belong to other inputs; each product is the same.
    assert torch.equal(found, plain)


def test_zero_points_of_0_in_the_first_version() -> None:
    """In a group without negative weights the zero point is 0; subtracting one borrows from the
    next zero point in the word."""
    weight = torch.randn(16, 64)
    weight[::3] = weight[::3].abs() + 0.1
    config = GPTQ | {"group_size": 32}
    tensors, plain = make_gptq(config, weight)
    assert torch.equal(
        read(Gptq(NO_MATMUL, config, "config.json"), layer(16, 64), [tensors]), plain
    )


def test_symmetric_zero_points_are_the_middle() -> None:
    """Checks the value that every tool writes for symmetric weights in version 1."""
    for bits, word in ((4, 0x77777777), (8, 0x7F7F7F7F)):
        tensors, _ = make_gptq(GPTQ | {"sym": True, "bits": bits}, torch.randn(16, 64))
        assert (tensors["qzeros"] == word).all()


def test_layers_that_are_left_out() -> None:
    name = "model.layers.1.self_attn.o_proj"
    kept = layer(64, 64)
    for scheme in (
        Awq(NO_MATMUL, AWQ | {"modules_to_not_convert": ["self_attn"]}, "config.json"),
        Gptq(NO_MATMUL, GPTQ | {"dynamic": {r"-:.*self_attn": {}}}, "config.json"),
        Gptq(
            NO_MATMUL,
            GPTQ | {"modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.down_proj"]]},
            "config.json",
        ),
    ):
        assert isinstance(scheme.parameters(layer(64, 64, name)), Declined)
        assert isinstance(scheme.parameters(layer(64, 64, "lm_head")), Declined)
        assert isinstance(scheme.parameters(kept), dict)
    assert isinstance(
        Gptq(NO_MATMUL, GPTQ | {"lm_head": True}, "config.json").parameters(
            layer(64, 64, "lm_head")
        ),
        dict,
    )


def test_gptq_with_other_settings_for_some_layers() -> None:
    config = GPTQ | {"dynamic": {r"+:.*down": {"bits": 8, "group_size": 32}}}
    changed, plain = make_gptq(GPTQ | {"bits": 8, "group_size": 32}, torch.randn(16, 64))
    assert torch.equal(
        read(Gptq(NO_MATMUL, config, "config.json"), layer(16, 64), [changed]), plain
    )
    mixed = LinearLayer("fused", (Part("a.down", 16), Part("a.up", 16)), 64, False, "float32")
    with pytest.raises(ConfigError, match=r"alike the fused layer|fused layer fused alike"):
        Gptq(NO_MATMUL, config, "config.json").parameters(mixed)


@pytest.mark.parametrize(
    ("scheme", "config", "message"),
    [
        (Awq, {"bits": 3}, r"model/config\.json: quantization_config\.bits is 3; supported: 4"),
        (
            Awq,
            AWQ | {"version": "gemv"},
            r"quantization_config\.version is 'gemv'; supported: 'gemm'",
        ),
        (
            Awq,
            AWQ | {"group_size": "128"},
            r"quantization_config\.group_size is '128'; it must be a number of inputs",
        ),
        (Gptq, {"bits": 2}, r"quantization_config\.bits is 2; supported: 4 and 8"),
        (
            Gptq,
            GPTQ | {"checkpoint_format": "marlin"},
            r"checkpoint_format is 'marlin'; supported: 'gptq' and 'gptq_v2'",
        ),
        (Gptq, GPTQ | {"group_size": 0}, r"quantization_config\.group_size is 0"),
        (Gptq, GPTQ | {"pack_dtype": "int64"}, r"pack_dtype is 'int64'; supported: 'int32'"),
        (Gptq, GPTQ | {"dynamic": {"+:.*up": {"bits": 3}}}, r"quantization_config\.bits is 3"),
    ],
)
def test_configurations_that_are_refused(scheme: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        scheme(NO_MATMUL, config, "model/config.json")


def test_sizes_that_the_format_cannot_hold() -> None:
    with pytest.raises(
        CheckpointError, match=r"its inputs are not a multiple of the group size 64"
    ):
        Awq(NO_MATMUL, AWQ, "config.json").parameters(layer(64, 100))
    with pytest.raises(
        CheckpointError, match=r"the outputs of .*down_proj are not a multiple of 8"
    ):
        Awq(NO_MATMUL, AWQ, "config.json").parameters(layer(61, 64))
    with pytest.raises(CheckpointError, match=r"its 100 inputs are not a multiple of 8"):
        Gptq(NO_MATMUL, GPTQ, "config.json").parameters(layer(64, 100))


def test_an_order_that_is_none() -> None:
    ordered = GPTQ | {"desc_act": True}
    one, weight = layer(16, 128), torch.randn(16, 128)
    tensors, _ = make_gptq(ordered, weight)
    with pytest.raises(
        CheckpointError,
        match=r"down_proj\.g_idx does not have contiguous groups of 64 inputs.*desc_act",
    ):
        read(Gptq(NO_MATMUL, GPTQ, "config.json"), one, [tensors])
    broken = {**tensors, "g_idx": torch.zeros(128, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"g_idx does not have 64 inputs in each of 2 groups"):
        read(Gptq(NO_MATMUL, ordered, "config.json"), one, [broken])
    fused = LinearLayer("qkv", (Part("q", 16), Part("k", 16)), 128, False, "float32")
    other, _ = make_gptq(ordered, weight, seed=1)
    with pytest.raises(CheckpointError, match=r"g_idx of q, k differ"):
        read(Gptq(NO_MATMUL, ordered, "config.json"), fused, [tensors, other])
