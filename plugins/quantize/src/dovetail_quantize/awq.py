"""Implement AWQ: input channels with large activations are scaled up before rounding, so that their
weights are rounded more finely.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ: Activation-aware Weight Quantization
for LLM Compression and Acceleration, arXiv 2306.00978. The scales are s = mean|x| ** alpha; one
alpha is searched for all linear layers that share an input. The preceding operation (a norm or a
linear layer) is divided by s, so that only the rounding changes. Each group's range is then clipped
to minimize the error. Errors are output errors over all tokens: tr(D X Xᵀ Dᵀ), where D is the error
of the weights.

Beyond the paper, the two ends of a range are clipped independently, also for queries and keys. With
grouped-query attention, value channels are divided as well; all query heads that share a value head
share its scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dovetail.errors import ConfigError
from dovetail_quantize.inputs import Inputs
from dovetail_quantize.rounding import Grid

NUM_ALPHAS = 20
FOLDS = (
    (("input_layernorm",), ("self_attn.q_proj", "self_attn.qkv_proj")),
    (("self_attn.v_proj",), ("self_attn.o_proj",)),
    (
        ("pre_feedforward_layernorm", "post_attention_layernorm"),
        ("mlp.gate_proj", "mlp.gate_up_proj"),
    ),
    (("mlp.up_proj",), ("mlp.down_proj",)),
)
"""Pairs of operations to divide (the first that the layer has is used) and linear layers to
multiply, together with all linear layers that have the same input."""


def fold_scales(
    layer: nn.Module, linears: Mapping[str, nn.Linear], inputs: Mapping[str, Inputs], grid: Grid
) -> dict[str, Inputs]:
    """Scale a decoder layer's channels in place. Returns the inputs after scaling. Raises
    `ConfigError` if the layer has no known operation that could be divided."""
    changed = dict(inputs)
    folded = False
    for sources, targets in FOLDS:
        target = next((t for t in targets if t in linears), None)
        candidates = [s for s in sources if target is not None and _submodule(layer, s) is not None]
        if target is None or not candidates:
            continue
        source, sharing = layer.get_submodule(candidates[0]), inputs[target].shared_by
        channels = _channels(layer, source, linears[target])
        if channels is None:
            continue
        weights = [linears[name].weight.data for name in sharing]
        scales = _search(torch.cat(weights), inputs[target], grid, channels)
        scales = _divide(source, scales, inputs[target].dtype)[channels]
        for name in sharing:
            linears[name].weight.data *= scales
            changed[name] = inputs[target].divided(scales)
        folded = True
    if not folded:
        names = ", ".join(n for n, _ in layer.named_children())
        raise ConfigError(
            f"awq: found no known norm before the linear layers of a decoder layer that consists"
            f" of {names}: use gptq"
        )
    return changed


def check_fold(before: Tensor, after: Tensor) -> None:
    """Raise `ConfigError` if scaling has changed the output of a layer. In that case the divided
    operation does not precede the multiplied linear layer in this architecture."""
    if ((after - before).norm(dim=-1) > 1e-2 * before.norm(dim=-1)).any():
        raise ConfigError(
            "awq: in this architecture the norms do not precede the linear layers in the usual way:"
            " use gptq"
        )


def _channels(layer: nn.Module, source: nn.Module, target: nn.Linear) -> Tensor | None:
    """Return i64[in]: for each input of a linear layer, the output channel of `source` that it
    comes from. None if that is unknown."""
    num_in, num_out = (
        target.in_features,
        source.out_features if isinstance(source, nn.Linear) else target.in_features,
    )
    if num_in == num_out:
        return torch.arange(num_in)
    # Query heads that share a value head are consecutive.
    size = getattr(getattr(layer, "self_attn", None), "head_dim", None)
    if not isinstance(size, int) or num_in % num_out or num_out % size:
        return None
    return torch.arange(num_out).view(-1, 1, size).expand(-1, num_in // num_out, -1).flatten()


def _search(weight: Tensor, inputs: Inputs, grid: Grid, channels: Tensor) -> Tensor:
    """Return f32[num_channels]: the scales of the alpha with the smallest error."""
    count = int(channels.max()) + 1
    size = (
        torch.zeros(count).index_add_(0, channels, inputs.mean_abs) * count / len(channels)
    ).clamp_min(1e-4)
    best, least = torch.ones(count), float("inf")
    for i in range(NUM_ALPHAS):
        scales = size ** (i / NUM_ALPHAS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        by_input = scales[channels]
        error = inputs.output_error(grid.round(weight * by_input).dequantize() / by_input - weight)
        if error < least:
            best, least = scales, error
    return best


def _divide(source: nn.Module, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide an operation's outputs. Returns the scales that its stored (rounded) weights
    effectively apply."""
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
        effective = torch.where(divided + offset == 0, scales, (kept + offset) / (divided + offset))
        weight.data = divided
        if bias is not None and shift is not None:
            bias.data = (shift / effective).to(dtype).float()
        if torch.allclose(source(probe) * effective, before, rtol=1e-2, atol=1e-3):
            return effective
    raise ConfigError(
        f"awq: {type(source).__name__}: its outputs cannot be divided by changing its weight:"
        " use gptq"
    )


def group_error(inputs: Inputs, size: int) -> Callable[[Tensor], Tensor]:
    """Return a function from weight errors f32[out, num_groups, size] to output errors f32[out,
    num_groups]."""
    blocks = torch.stack(
        [inputs.gram[i : i + size, i : i + size] for i in range(0, len(inputs.gram), size)]
    )
    return lambda difference: (torch.einsum("ogi,gij->ogj", difference, blocks) * difference).sum(
        -1
    )


def _submodule(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None
