"""AWQ: channels whose inputs are large are scaled up before rounding, so that their weights are rounded finer.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration, arXiv 2306.00978. The scales s = mean|x| ** alpha are searched for, one alpha for all layers that have one input;
what comes before these (a norm, or a linear layer) is divided by s, which changes nothing but the rounding. Then each group's
range is clipped to where the error is least. Errors of outputs are exact over all tokens: tr(D X Xᵀ Dᵀ), D the error of the
weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dovetail.errors import ConfigError
from dovetail_quantize.inputs import Inputs
from dovetail_quantize.rounding import Grid

NUM_ALPHAS = 20
CLIPS = tuple(1 - 0.05 * i for i in range(11))
FOLDS = (
    (("input_layernorm",), ("self_attn.q_proj", "self_attn.qkv_proj")),
    (("self_attn.v_proj",), ("self_attn.o_proj",)),
    (("pre_feedforward_layernorm", "post_attention_layernorm"), ("mlp.gate_proj", "mlp.gate_up_proj")),
    (("mlp.up_proj",), ("mlp.down_proj",)),
)
"""What may be divided, the first that the layer has, and for which linear layer (with it, all that have the same input)."""
NOT_CLIPPED = ("q_proj", "k_proj", "qkv_proj")
"""Their product is exponentiated: the paper's authors leave them out."""


def fold_scales(layer: nn.Module, linears: Mapping[str, nn.Linear], inputs: Mapping[str, Inputs], grid: Grid) -> dict[str, Inputs]:
    """Scale a decoder layer's channels, in place; returns the inputs as they then are. Raises `ConfigError` if it knows no
    operation of the layer that could be divided."""
    changed = dict(inputs)
    folded = False
    for sources, targets in FOLDS:
        target = next((t for t in targets if t in linears), None)
        found = [s for s in sources if target is not None and _module(layer, s) is not None]
        if target is None or not found:
            continue
        source, sharing = _module(layer, found[0]), inputs[target].shared_by
        if isinstance(source, nn.Linear) and source.out_features != linears[target].in_features:
            continue  # heads that share keys and values: one channel before is several after
        weights = [linears[name].weight.data for name in sharing]
        scales = _search(torch.cat(weights), inputs[target], grid)
        assert source is not None
        scales = _divide(source, scales, inputs[target].dtype)
        for name in sharing:
            linears[name].weight.data *= scales
            changed[name] = inputs[target].divided(scales)
        folded = True
    if not folded:
        names = ", ".join(n for n, _ in layer.named_children())
        raise ConfigError(f"awq: knows no norm before the linear layers of a decoder layer made of {names}: use gptq")
    return changed


def _search(weight: Tensor, inputs: Inputs, grid: Grid) -> Tensor:
    """f32[in]: of all alphas, the scales with the least error."""
    best, least = torch.ones_like(inputs.mean_abs), float("inf")
    size = inputs.mean_abs.clamp_min(1e-4)
    for i in range(NUM_ALPHAS):
        scales = size ** (i / NUM_ALPHAS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = inputs.output_error(grid.round(weight * scales).weight() / scales - weight)
        if error < least:
            best, least = scales, error
    return best


def _divide(source: nn.Module, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide an operation's outputs; returns the scales as its stored weights have really taken them."""
    if isinstance(source, nn.Linear):
        source.weight.data /= scales[:, None]
        if source.bias is not None:
            source.bias.data = (source.bias.data / scales).to(dtype).float()
        return scales
    weight = source.weight
    assert isinstance(weight, Tensor)
    probe = torch.linspace(-1, 1, 4 * weight.numel()).view(4, -1)
    before, kept = source(probe), weight.data.clone()
    bias = getattr(source, "bias", None)
    shift = None if bias is None else bias.data.clone()
    for offset in (0.0, 1.0):  # some norms multiply by 1 + weight
        divided = ((kept + offset) / scales - offset).to(dtype).float()
        taken = torch.where(divided + offset == 0, scales, (kept + offset) / (divided + offset))
        weight.data = divided
        if bias is not None and shift is not None:
            bias.data = (shift / taken).to(dtype).float()
        if torch.allclose(source(probe) * taken, before, rtol=1e-2, atol=1e-3):
            return taken
    raise ConfigError(f"awq: {type(source).__name__} is no norm whose outputs can be divided by changing its weight: use gptq")


def clips(name: str, weight: Tensor, inputs: Inputs, grid: Grid) -> Tensor | float:
    """f32[out, num_groups]: how much of each group's range to keep."""
    if name.rpartition(".")[2] in NOT_CLIPPED:
        return 1.0
    size = grid.size(weight.shape[1])
    blocks = torch.stack([inputs.gram[i : i + size, i : i + size] for i in range(0, weight.shape[1], size)])
    split = weight.unflatten(1, (-1, size))
    best = torch.ones(split.shape[:2])
    least = torch.full(split.shape[:2], float("inf"))
    for clip in CLIPS:
        error = grid.round(weight, clip).weight().unflatten(1, (-1, size)) - split
        by_group = (torch.einsum("ogi,gij->ogj", error, blocks) * error).sum(-1)
        better = by_group < least
        best[better], least[better] = clip, by_group[better]
    return best


def _module(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


