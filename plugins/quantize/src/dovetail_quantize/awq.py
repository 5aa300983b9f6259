"""AWQ: channels whose inputs are large are scaled up before rounding, so that their weights are
rounded finer.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ: Activation-aware Weight Quantization
for LLM Compression and Acceleration, arXiv 2306.00978. The scales s = mean|x| ** alpha are searched
for, one alpha for all layers that have one input; what comes before these (a norm, or a linear
layer) is divided by s, which changes nothing but the rounding. Then each group's range is clipped
to where the error is least. Errors are those of outputs over all tokens: tr(D X Xᵀ Dᵀ), D the error
of the weights. Beyond the paper, both ends of a range are clipped by themselves, those of queries
and keys too; and values whose heads are shared are divided as well, by one scale for all that share
them.
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
"""What may be divided, the first that the layer has, and for which linear layer (with it, all that
have the same input)."""


def fold_scales(
    layer: nn.Module, linears: Mapping[str, nn.Linear], inputs: Mapping[str, Inputs], grid: Grid
) -> dict[str, Inputs]:
    """Scale a decoder layer's channels, in place; returns the inputs as they then are. Raises
    `ConfigError` if it knows no operation of the layer that could be divided."""
    changed = dict(inputs)
    folded = False
    for sources, targets in FOLDS:
        target = next((t for t in targets if t in linears), None)
        found = [s for s in sources if target is not None and _module(layer, s) is not None]
        if target is None or not found:
            continue
        source, sharing = layer.get_submodule(found[0]), inputs[target].shared_by
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
            f"awq: knows no norm before the linear layers of a decoder layer made of {names}: use"
            " gptq"
        )
    return changed


def check_fold(before: Tensor, after: Tensor) -> None:
    """Raise `ConfigError` if a layer computes something else than before its channels were scaled:
    what was divided does not come before what was multiplied, in this architecture."""
    if ((after - before).norm(dim=-1) > 1e-2 * before.norm(dim=-1)).any():
        raise ConfigError(
            "awq: in this architecture the norms do not come before the linear layers in the usual"
            " way: use gptq"
        )


def _channels(layer: nn.Module, source: nn.Module, target: nn.Linear) -> Tensor | None:
    """i64[in]: by input of a layer, the channel before that it comes from; None if that is not
    known."""
    num_in, num_out = (
        target.in_features,
        source.out_features if isinstance(source, nn.Linear) else target.in_features,
    )
    if num_in == num_out:
        return torch.arange(num_in)
    size = getattr(
        getattr(layer, "self_attn", None), "head_dim", None
    )  # query heads that share a value head follow each other
    if not isinstance(size, int) or num_in % num_out or num_out % size:
        return None
    return torch.arange(num_out).view(-1, 1, size).expand(-1, num_in // num_out, -1).flatten()


def _search(weight: Tensor, inputs: Inputs, grid: Grid, channels: Tensor) -> Tensor:
    """f32[num_channels]: of all alphas, the scales with the least error."""
    count = int(channels.max()) + 1
    size = (
        torch.zeros(count).index_add_(0, channels, inputs.mean_abs) * count / len(channels)
    ).clamp_min(1e-4)
    best, least = torch.ones(count), float("inf")
    for i in range(NUM_ALPHAS):
        scales = size ** (i / NUM_ALPHAS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        spread = scales[channels]
        error = inputs.output_error(grid.round(weight * spread).weight() / spread - weight)
        if error < least:
            best, least = scales, error
    return best


def _divide(source: nn.Module, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide an operation's outputs; returns the scales as its stored weights have really taken
    them."""
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
    raise ConfigError(
        f"awq: {type(source).__name__} is no norm whose outputs can be divided by changing its"
        " weight: use gptq"
    )


def group_error(inputs: Inputs, size: int) -> Callable[[Tensor], Tensor]:
    """Of the outputs, by group of inputs: for differences of weights f32[out, num_groups, size]."""
    blocks = torch.stack(
        [inputs.gram[i : i + size, i : i + size] for i in range(0, len(inputs.gram), size)]
    )
    return lambda difference: (torch.einsum("ogi,gij->ogj", difference, blocks) * difference).sum(
        -1
    )


def _module(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None
