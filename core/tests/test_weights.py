"""Layers that are alike are told in one line."""

from __future__ import annotations

import msgspec

from dovetail.interfaces.weights import LayerWeights, alike

ONE = LayerWeights("", 64, 32, "quantization", "awq", "uint4", "matmul: cpu", 1000)


def named(name: str, **changes: object) -> LayerWeights:
    return msgspec.structs.replace(ONE, name=name, **changes)


def test_layers_that_differ_in_their_number_alone() -> None:
    layers = [
        named(f"model.layers.{i}.mlp.{which}")
        for i in range(12)
        for which in ("up_proj", "down_proj")
    ]
    found = alike([*layers, named("lm_head", scheme="none")])
    assert [(group.names, group.count, group.nbytes) for group in found] == [
        ("model.layers.{0..11}.mlp.up_proj", 12, 12000),
        ("model.layers.{0..11}.mlp.down_proj", 12, 12000),
        ("lm_head", 1, 1000),
    ]


def test_layers_that_differ_in_more() -> None:
    kinds = ["awq", "awq", "none", "awq", "none", "awq", "awq", "awq"]
    found = alike(
        named(f"model.layers.{i}.mlp.up_proj", scheme=kind) for i, kind in enumerate(kinds)
    )
    assert [(group.names, group.one.scheme) for group in found] == [
        ("model.layers.{0..1,3,5..7}.mlp.up_proj", "awq"),
        ("model.layers.{2,4}.mlp.up_proj", "none"),
    ]


def test_one_layer_is_itself() -> None:
    assert [group.names for group in alike([named("h.7.experts.3.w1")])] == ["h.7.experts.3.w1"]
    both = alike([named("h.7.experts.3.w1"), named("h.8.experts.3.w1"), named("h.8.experts.4.w1")])
    assert [group.names for group in both] == ["h.{7..8}.experts.3.w1", "h.8.experts.4.w1"]
