"""Rotary position embeddings (RoPE, arXiv:2104.09864) and the ways to stretch them over longer
contexts.

Everything is a choice of inverse frequencies: pair i of a head turns by `position * inv_freq[i]`
radians, and queries and keys may be scaled by a factor along the way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DEFAULT_THETA = 10000.0


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE part of a config.json: `rope_parameters`, or `rope_theta` and `rope_scaling` before
    transformers 5.

    Raises `ValueError` for what no architecture here has.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta")
    parameters["rope_theta"] = (
        float(config.get("rope_theta") or DEFAULT_THETA) if theta is None else float(theta)
    )
    original = config.get("original_max_position_embeddings")
    if original is None:
        original = parameters.get("original_max_position_embeddings") or config.get(
            "max_position_embeddings"
        )
    parameters["original_max_position_embeddings"] = original
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor {partial} is not supported for this architecture")
    return parameters


def inverse_frequencies(
    parameters: dict[str, Any], head_size: int, max_position_embeddings: int
) -> tuple[Tensor, float]:
    """Return `f32[head_size / 2]` in radians per token, and the factor on cos and sin.

    `parameters` as `rope_parameters` returns them. Raises `ValueError` for a type that is not known
    or a key that is missing.
    """
    if head_size % 2:
        raise ValueError(f"rotary embeddings need an even head size, found {head_size}")
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    pos_freqs: Tensor = parameters["rope_theta"] ** exponents
    try:
        match parameters["rope_type"]:
            case "default" | "dynamic":
                # Dynamic NTK changes the base only past max_position_embeddings, which no sequence
                # here exceeds.
                return 1.0 / pos_freqs, 1.0
            case "linear":  # position interpolation, arXiv:2306.15595
                return 1.0 / pos_freqs / parameters["factor"], 1.0
            case "llama3":
                return _llama3(1.0 / pos_freqs, parameters), 1.0
            case "yarn":
                return _yarn(pos_freqs, parameters, head_size, max_position_embeddings)
            case other:
                raise ValueError(
                    f"rope_type {other!r} is not supported; known are default, dynamic, linear,"
                    " llama3, yarn"
                )
    except KeyError as e:
        raise ValueError(f"rope_type {parameters['rope_type']!r} needs {e.args[0]!r}") from None


def _llama3(inv_freq: Tensor, parameters: dict[str, Any]) -> Tensor:
    """Llama 3.1's scaling, as its config names it: long wavelengths are slowed by `factor`, short
    ones kept.

    A wavelength is in tokens per turn. Between `original / low_freq_factor` and `original /
    high_freq_factor` the two are blended linearly in the number of turns over the original context.
    """
    factor, low, high = (
        parameters["factor"],
        parameters["low_freq_factor"],
        parameters["high_freq_factor"],
    )
    turns = parameters["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = (1 - kept) * inv_freq / factor + kept * inv_freq
    return scaled


def _yarn(
    pos_freqs: Tensor, parameters: dict[str, Any], head_size: int, max_position: int
) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071, section 3.2, "NTK-by-parts", and 3.4 for the factor on attention)."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_position / original
    beta_fast, beta_slow = parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1

    def pair_that_turns(times: float) -> float:
        """Index of the pair that turns so many times over the original context."""
        return (
            head_size
            * math.log(original / (times * 2 * math.pi))
            / (2 * math.log(parameters["rope_theta"]))
        )

    first, last = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    last = last + 0.001 if first == last else last
    ramp = ((torch.arange(head_size // 2, dtype=torch.float32) - first) / (last - first)).clamp(
        0, 1
    )
    inv_freq = ramp / (factor * pos_freqs) + (1 - ramp) / pos_freqs

    scale = parameters.get("attention_factor")
    if scale is None:
        mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            scale = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            scale = _yarn_mscale(factor, 1.0)
    return inv_freq, float(scale)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class RotaryEmbedding:
    """cos and sin of a step's positions; computed once a step for all layers, so that no table
    bounds the context."""

    def __init__(
        self, inv_freq: Tensor, scale: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        # The first half of a head is rotated by the negative angle's sine: x1 cos - x2 sin, then x2
        # cos + x1 sin. With the sign in the frequency, both are x * cos + swapped halves * sin, and
        # cos does not notice.
        self._signed_freq = torch.cat((-inv_freq, inv_freq)).to(device)
        self._scale = scale
        self._dtype = dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`positions: i64[T]` -> cos and sin, each `[T, 1, D]`, sin negated in its first half."""
        angles = (
            positions[:, None, None] * self._signed_freq
        )  # float32: bfloat16 cannot count past 256
        cos, sin = angles.cos(), angles.sin_()
        if self._scale != 1.0:
            cos, sin = cos.mul_(self._scale), sin.mul_(self._scale)
        return cos.to(self._dtype), sin.to(self._dtype)
