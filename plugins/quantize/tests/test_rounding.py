"""Test rounding, packing, GPTQ and AWQ, each against a slow and obvious implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import unpacking
from torch import Tensor, nn

from dovetail.errors import ConfigError
from dovetail_quantize import awq, formats
from dovetail_quantize.gptq import gptq_quantize
from dovetail_quantize.inputs import Inputs, measure
from dovetail_quantize.rounding import (
    FP8,
    Grid,
    PerChannelGrid,
    fake_quantize_per_token,
    fit_min_error,
)
from dovetail_quantize.skeleton import Skeleton


def correlated(num_tokens: int, size: int) -> Tensor:
    """Return correlated inputs f32[num_tokens, size], a few of which are large."""
    shared = torch.randn(num_tokens, 3) @ torch.randn(3, size)
    return (torch.randn(num_tokens, size) + shared) * torch.rand(size).mul(4).exp() / 10


def gram(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_gptq_files_hold_the_weights(bits: int, symmetric: bool, desc_act: bool) -> None:
    weight, x = torch.randn(24, 64), correlated(100, 64)
    grid = Grid(bits, 16, symmetric)
    rounded = gptq_quantize(weight, gram(x), grid, desc_act=desc_act, damp=0.01)
    found = unpacking.gptq(formats.gptq(rounded, grid), bits, formats.gptq_version(grid))
    assert torch.equal(found, rounded.dequantize())
    assert (found - weight).norm() < weight.norm() * (0.3 if bits == 4 else 0.02)
    assert (rounded.groups.sort().values == torch.arange(64) // 16).all()
    assert desc_act or (rounded.groups == torch.arange(64) // 16).all()


@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_awq_files_hold_the_weights(group_size: int) -> None:
    weight = torch.randn(24, 64)
    rounded = Grid(4, group_size, symmetric=False).round(weight)
    assert torch.equal(unpacking.awq(formats.awq(rounded), group_size), rounded.dequantize())


@pytest.mark.parametrize(("codes", "error"), [(torch.int8, 0.02), (FP8, 0.04)])
def test_compressed_files_hold_the_weights(codes: torch.dtype, error: float) -> None:
    weight = torch.randn(24, 64) * torch.rand(24, 1)
    weight[3] = 0
    rounded = PerChannelGrid(codes, torch.bfloat16).round(weight)
    tensors = formats.compressed_tensors(rounded, torch.bfloat16)
    assert tensors["weight"].dtype == codes
    assert torch.equal(unpacking.compressed(tensors), rounded.dequantize())
    assert (rounded.dequantize() - weight).norm() < error * weight.norm()
    x = torch.randn(5, 64) * torch.rand(5, 1)
    assert ((fake_quantize_per_token(x, codes) - x).norm(dim=1) < error * x.norm(dim=1)).all()


def gptq_by_definition(weight: Tensor, hessian: Tensor, grid: Grid, damp: float) -> Tensor:
    """Apply equations 2 and 3 of the paper directly: after each column, the inverse Hessian of the
    remaining columns is computed again."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += damp * h.diagonal().mean() * torch.eye(len(h))
    out = torch.empty_like(w)
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(h[i:, i:])
        if i % grid.group_size == 0:
            costs = torch.linalg.cholesky(inverse, upper=True).diagonal()[: grid.group_size] ** -2
            scale, zero = fit_min_error(
                grid,
                w[:, i : i + grid.group_size].float(),
                lambda d, by=costs: (d.square() * by).sum(-1),
            )
        code = grid.nearest(w[:, i].float(), scale, zero)
        out[:, i] = (code - zero) * scale
        w[:, i:] -= ((w[:, i] - out[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    return out.float()


@pytest.mark.parametrize(("size", "group_size"), [(48, 16), (200, 40), (256, 128)])
def test_gptq_is_the_papers(size: int, group_size: int) -> None:
    """Covers blocks whose boundaries are not those of groups."""
    weight, x, grid = torch.randn(8, size), correlated(2 * size, size), Grid(4, group_size, True)
    expected = gptq_by_definition(weight, gram(x), grid, 0.01)
    found = gptq_quantize(weight, gram(x), grid, desc_act=False, damp=0.01).dequantize()
    # A weight halfway between two codes may be rounded either way, and then the rest of its row
    # differs too.
    same = (found - expected).abs().amax(1) < 1e-3
    assert same.sum() >= 6, (found - expected).abs().amax(1)


@pytest.mark.parametrize("desc_act", [True, False])
def test_gptq_errs_less_than_rounding_to_nearest(desc_act: bool) -> None:
    weight, x, grid = torch.randn(32, 96), correlated(400, 96), Grid(4, 32, True)
    found = gptq_quantize(weight, gram(x), grid, desc_act=desc_act, damp=0.01).dequantize()
    nearest = grid.round(weight).dequantize()
    assert ((found - weight) @ x.T).norm() < 0.8 * ((nearest - weight) @ x.T).norm()


@pytest.mark.parametrize(("codes", "most"), [(torch.int8, 0.8), (FP8, 0.7)])
def test_rows_of_eight_bits_err_less_in_sequence(codes: torch.dtype, most: float) -> None:
    """Float codes also gain by the choice of scales, because codes are twice as dense below a power
    of two."""
    weight, x, grid = (
        torch.randn(64, 96),
        correlated(400, 96),
        PerChannelGrid(codes, torch.bfloat16),
    )
    rounded = gptq_quantize(weight, gram(x), grid, desc_act=True, damp=0.01)
    nearest = grid.round(weight)
    assert ((rounded.dequantize() - weight) @ x.T).norm() < most * (
        (nearest.dequantize() - weight) @ x.T
    ).norm()
    assert rounded.codes.dtype == codes
    assert (rounded.groups == 0).all()
    assert torch.equal(rounded.scales, nearest.scales) == (codes == torch.int8)
    assert (rounded.scales >= nearest.scales).all(), "nothing is clipped"


def test_gptq_takes_inputs_that_never_were_active() -> None:
    x = correlated(50, 32)
    x[:, [3, 17]] = 0
    rounded = gptq_quantize(
        torch.randn(8, 32), gram(x), Grid(4, 16, True), desc_act=True, damp=0.01
    )
    assert rounded.dequantize().isfinite().all()


class OnePlus(nn.Module):
    """A norm that multiplies by 1 + weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * (1 + self.weight)


class Layer(nn.Module):
    """A module whose submodules are named as in decoder layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = norm
        self.self_attn = nn.Module()
        self.self_attn.q_proj, self.self_attn.v_proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.self_attn.o_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.input_layernorm(x)
        out: Tensor = self.self_attn.o_proj(self.self_attn.v_proj(h)) + self.self_attn.q_proj(h)
        return out


def scaled(norm: nn.Module) -> tuple[Layer, Tensor, dict[str, nn.Linear], dict[str, Inputs]]:
    layer, x = Layer(norm).requires_grad_(False), torch.randn(200, 32)
    layer.input_layernorm.weight.data *= torch.rand(32).mul(4).exp()
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    return layer, x, linears, measure(linears, torch.float32, [lambda: layer(x)])


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, OnePlus])
def test_awq_changes_nothing_but_the_rounding(norm: type[nn.Module]) -> None:
    layer, x, linears, inputs = scaled(norm(32))
    before, kept = layer(x), {name: linear.weight.clone() for name, linear in linears.items()}
    given = awq.fold_scales(layer, linears, inputs, Grid(4, 16, False))
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    assert not torch.equal(linears["self_attn.q_proj"].weight, kept["self_attn.q_proj"]), (
        "its inputs differ much in size"
    )
    now = measure(linears, torch.float32, [lambda: layer(x)])
    for name, found in now.items():
        torch.testing.assert_close(
            found.gram, given[name].gram, rtol=1e-2, atol=1e-3 * float(found.gram.abs().max())
        )


def test_awq_errs_less_than_rounding_to_nearest() -> None:
    grid = Grid(4, 16, False)
    layer, x, linears, inputs = scaled(nn.RMSNorm(32))
    weight = linears["self_attn.q_proj"].weight.clone()
    h = layer.input_layernorm(x)
    nearest = ((grid.round(weight).dequantize() - weight) @ h.T).norm()
    given = awq.fold_scales(layer, linears, inputs, grid)
    name = "self_attn.q_proj"
    scaled_weight = linears[name].weight
    ours = (grid.round(scaled_weight).dequantize() - scaled_weight) @ layer.input_layernorm(x).T
    assert ours.norm() < nearest
    clipped = (
        grid.round(scaled_weight, awq.group_error(given[name], 16)).dequantize() - scaled_weight
    )
    assert (clipped @ layer.input_layernorm(x).T).norm() < ours.norm()


def test_ranges_are_clipped_to_where_the_error_is_least() -> None:
    """With one large weight on an input that is hardly ever active, clipping excludes that weight
    in nearly all rows."""
    weight, x = torch.rand(64, 16) - 0.5, torch.randn(100, 16)
    weight[:, 5] = 1.5
    x[:, 5] *= 1e-3
    inputs = Inputs(gram(x), x.abs().mean(0), ("a",), torch.float32)

    def errors(difference: Tensor) -> Tensor:
        return ((difference @ inputs.gram) * difference).sum(1)

    for grid in (Grid(4, 16, symmetric=True), Grid(4, 16, symmetric=False)):
        rounded = grid.round(weight, awq.group_error(inputs, 16))
        assert (rounded.scales < grid.round(weight).scales).float().mean() > 0.7
        fits = [[t[:, None] for t in grid.fit(weight, clip)] for clip in grid.clips()]
        trials = torch.stack(
            [errors((grid.nearest(weight, s, z) - z) * s - weight) for s, z in fits]
        )
        torch.testing.assert_close(
            errors(rounded.dequantize() - weight), trials.min(0).values, rtol=1e-3, atol=1e-6
        )


def test_awq_rejects_unknown_architectures() -> None:
    layer = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))
    linears = {"1": layer[1]}
    inputs = measure(linears, torch.float32, [lambda: layer(torch.randn(4, 32))])  # type: ignore[dict-item]
    with pytest.raises(
        ConfigError, match=r"found no known norm before the linear layers.*use gptq"
    ):
        awq.fold_scales(layer, linears, inputs, Grid(4, 16, False))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Qwen3"])
def test_awq_changes_no_model(family: str, tmp_path: Path) -> None:
    """Covers grouped-query attention, norms that multiply by 1 + weight, and query and key
    norms."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=64,
    )
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    skeleton, ids = Skeleton(tmp_path), torch.randint(1, 64, (1, 24))
    with torch.inference_mode(), skeleton.ends_loaded() as ends:
        hidden = ends.embed(ids)
        hidden = hidden * torch.rand(64).mul(4).exp()
        with skeleton.loaded(0) as layer:
            linears = skeleton.linears(0)
            linears["self_attn.v_proj"].weight.data *= (
                torch.rand(32, 1).mul(4).exp()
            )  # values that differ much in size
            before = skeleton.run_layer(0, hidden)
            inputs = measure(linears, torch.float32, [lambda: skeleton.run_layer(0, hidden)])
            kept = linears["self_attn.o_proj"].weight.clone()
            awq.fold_scales(layer, linears, inputs, Grid(4, 16, False))
            after = skeleton.run_layer(0, hidden)
            assert not torch.equal(kept, linears["self_attn.o_proj"].weight)
    torch.testing.assert_close(
        after - hidden, before - hidden, rtol=1e-3, atol=1e-3 * float((before - hidden).abs().max())
    )


def test_layers_of_one_input_are_measured_once() -> None:
    x = torch.randn(7, 32)
    _, _, _, inputs = scaled(nn.RMSNorm(32))
    assert inputs["self_attn.q_proj"] is inputs["self_attn.v_proj"]
    assert inputs["self_attn.q_proj"].shared_by == ("self_attn.q_proj", "self_attn.v_proj")
    assert inputs["self_attn.o_proj"].shared_by == ("self_attn.o_proj",)
    linear = nn.Linear(32, 8)
    found = measure({"a": linear}, torch.float32, [lambda: linear(x), lambda: linear(2 * x)])["a"]
    torch.testing.assert_close(found.gram, (x.T @ x) * 5 / 14)
    torch.testing.assert_close(found.mean_abs, x.abs().sum(0) * 3 / 14)
