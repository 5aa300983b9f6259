"""How the tensors of a scheme come from a checkpoint: parts in any order, made when complete,
faults named; KV scales."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dovetail.errors import CheckpointError, PluginError
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import IN, OUT, LinearLayer, Parameter, Part
from dovetail_worker_torch.loading.linear import TorchLinears
from dovetail_worker_torch.loading.quantized import QuantizedLayers, QuantizedLinear

CPU = torch.device("cpu")
QKV = LinearLayer("qkv", (Part("q", 6), Part("k", 2), Part("v", 2)), 4, True, "float32")
PARAMETERS = {"codes": Parameter((IN, OUT), "int8"), "scale": Parameter((), "float32")}


class Scheme:
    """int8 with a scale for the whole of a part, stored the other way round."""

    unused = ("*.zero",)

    def __init__(self) -> None:
        self.made: list[str] = []

    def linear(self, layer: LinearLayer, tensors: Any) -> Any:
        self.made.append(layer.name)
        scale = tensors["scale"].repeat_interleave(
            torch.tensor([p.out_features for p in layer.parts])
        )
        weight, bias = tensors["codes"].T.float() * scale[:, None], tensors["bias"]
        return lambda x: x @ weight.T + bias

    def quantize(self, layer: LinearLayer, weight: Any) -> dict[str, Any]:
        assert [p.name for p in layer.parts] == [layer.name]
        assert weight.is_contiguous()
        scale = weight.abs().max() / 127
        return {"codes": (weight / scale).round().to(torch.int8).T, "scale": scale}

    def kv_scales(self, name: str) -> dict[str, Parameter] | None:
        return {
            f"{name}.k_scale": Parameter((1,), "float32"),
            f"{name}.v_scale": Parameter((), "float32"),
        }


def test_stored_parts_in_any_order() -> None:
    """Of numbers whose products and sums float32 holds exactly."""
    scheme = Scheme()
    linear = QuantizedLinear("kit", scheme, QKV, PARAMETERS)  # type: ignore[arg-type]
    sizes = {p.name: p.out_features for p in QKV.parts}
    stored: dict[str, Any] = {}
    for name, size in sizes.items():
        stored[f"{name}.codes"] = torch.randint(-127, 127, (4, size), dtype=torch.int8)
        stored[f"{name}.scale"] = torch.tensor(2.0 ** random.randint(-6, 0))
        stored[f"{name}.bias"] = torch.randint(-99, 99, (size,)).float()
    targets = linear.targets()
    assert {name: target.shape for name, target in targets.items()} == {
        name: tuple(t.shape) for name, t in stored.items()
    }
    names = random.sample(sorted(stored), len(stored))
    for name in names:
        assert scheme.made == []
        targets[name].store(stored[name])
    assert scheme.made == ["qkv"]
    x = torch.randint(-9, 9, (3, 4)).float()
    parts = [
        x @ stored[f"{n}.codes"].float() * stored[f"{n}.scale"] + stored[f"{n}.bias"] for n in sizes
    ]
    assert torch.equal(linear(x), torch.cat(parts, 1))
    assert linear(x, torch.float64).dtype == torch.float64


def test_plain_weights_are_quantized_by_part() -> None:
    scheme = Scheme()
    layer = LinearLayer("qkv", QKV.parts, 4, True, "float32", stored=False)
    linear = QuantizedLinear("kit", scheme, layer, PARAMETERS)  # type: ignore[arg-type]
    weights = {p.name: torch.randn(p.out_features, 4) * 10**i for i, p in enumerate(QKV.parts)}
    for name, target in linear.targets().items():
        part, _, kind = name.partition(".")
        # As a transposed matrix comes.
        target.store(
            weights[part].T.contiguous().T if kind == "weight" else torch.zeros(target.shape)
        )
    x = torch.randn(3, 4)
    exact = torch.cat([x @ w.T for w in weights.values()], 1)
    step = torch.cat([(w.abs().max() / 127).expand(len(w)) for w in weights.values()])
    assert ((linear(x) - exact).abs() <= 0.51 * step * x.abs().sum(1, keepdim=True)).all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda made: {**made, "codes": made["codes"].T},
            r"declares codes \[4, 6\] int8 for q, and quantize gave \[6, 4\]",
        ),
        (
            lambda made: {**made, "scale": made["scale"].double()},
            r"declares scale \[\] float32 for q.*float64",
        ),
        (lambda made: {"codes": made["codes"]}, r"declares scale .* quantize gave nothing"),
        (lambda made: 1 / 0, r"kit failed at q: ZeroDivisionError"),
    ],
)
def test_what_a_scheme_does_wrong_names_it(fault: Any, message: str) -> None:
    class Wrong(Scheme):
        def quantize(self, layer: LinearLayer, weight: Any) -> dict[str, Any]:
            return fault(super().quantize(layer, weight))  # type: ignore[no-any-return]

    layer = LinearLayer("qkv", QKV.parts, 4, False, "float32", stored=False)
    linear = QuantizedLinear("kit", Wrong(), layer, PARAMETERS)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=message) as e:
        linear.targets()["q.weight"].store(torch.randn(6, 4))
    assert e.value.provider == "kit"


def test_a_plain_weight_that_is_no_number_is_named() -> None:
    layer = LinearLayer("qkv", QKV.parts, 4, False, "float32", stored=False)
    parameters = {**PARAMETERS, "scale": Parameter((), "float32", scale="not negative")}
    linear = QuantizedLinear("kit", Scheme(), layer, parameters)  # type: ignore[arg-type]
    weight = torch.randn(6, 4)
    weight[2, 1] = torch.nan
    with pytest.raises(CheckpointError, match=r"q\.weight, quantized: its scale has the value nan"):
        linear.targets()["q.weight"].store(weight)


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "bfloat16"])
def test_scales_of_the_kv_cache_are_read_where_it_has_one_byte(kv_dtype: str) -> None:
    choices = {
        "quantization": SimpleNamespace(extension_point="quantization", requested="auto", match="*")
    }
    plan = SimpleNamespace(choices=choices, quantization_rules=choices, device="cpu")
    context: Any = SimpleNamespace(plan=plan, build=lambda key: Scheme())
    layers = QuantizedLayers(context, TorchLinears(torch.float32, CPU), "float32", kv_dtype)
    layer = layers.attention("l.attn", AttentionLayer(0, 2, 2, 8, 1.0))
    if kv_dtype == "bfloat16":
        assert (layer.kv_scales, layers.targets()) == (None, {})
        return
    targets = layers.targets()
    targets["l.attn.v_scale"].store(torch.tensor(3.0))
    targets["l.attn.k_scale"].store(torch.tensor([2.0]))
    assert layer.kv_scales is not None
    assert layer.kv_scales.tolist() == [2.0, 3.0]
    assert layers.unused() == ["*.zero"]
