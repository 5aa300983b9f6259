"""Quantize weights: integer and float grids, per channel or per group of inputs, and rounding to
nearest.

weight[o, i] = scales[o, groups[i]] * (codes[o, i] - zeros[o, groups[i]])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
MIN_SCALE = 1e-8
"""Smallest scale, used if all weights are zero."""
MIN_SCALE_HALF = 2**-20
"""Smallest scale in float16."""
CLIPS = tuple(1 - 0.07 * i for i in range(6))
"""Fractions of each end of a range to try when clipping."""
OCTAVE = 8
"""Number of scales per power of two that are tried for float codes."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight `[out, in]`. `dequantize` returns exactly what every reader of the
    checkpoint computes with."""

    codes: Tensor
    """[out, in]: u8 below 2 ** bits, i8, or f8_e4m3."""
    scales: Tensor
    """f32[out, num_groups], with values that the checkpoint's dtype represents exactly."""
    zeros: Tensor
    """i32[out, num_groups]"""
    groups: Tensor
    """i32[in]: the group of each input."""

    def dequantize(self) -> Tensor:
        """Return the weight as f32[out, in]."""
        index = self.groups.long()
        return (self.codes.float() - self.zeros.float()[:, index]) * self.scales[:, index]

    def rows(self, begin: int, end: int) -> QuantizedWeight:
        """Return a range of the output channels."""
        return replace(
            self,
            codes=self.codes[begin:end],
            scales=self.scales[begin:end],
            zeros=self.zeros[begin:end],
        )


@dataclass(frozen=True)
class Grid:
    """Unsigned integers of `bits` bits with a scale and a zero point per group of inputs."""

    bits: int
    group_size: int
    """Number of inputs per group; -1 means all."""
    symmetric: bool
    """If true, the zero point is always the middle of the range."""

    @property
    def codes(self) -> torch.dtype:
        return torch.uint8

    @property
    def largest(self) -> int:
        return (1 << self.bits) - 1

    def size(self, in_features: int) -> int:
        """Return the number of inputs per group."""
        return in_features if self.group_size == -1 else self.group_size

    def clips(self) -> list[tuple[float, float]]:
        """Return the clippings to try, as fractions of the low and the high end of a range."""
        return (
            [(c, c) for c in CLIPS]
            if self.symmetric
            else [(low, high) for low in CLIPS for high in CLIPS]
        )

    def fit(self, weight: Tensor, clip: tuple[float, float] = (1.0, 1.0)) -> tuple[Tensor, Tensor]:
        """Return scales and zero points f32[...] that span the range of the last axis of `weight`
        [..., size], clipped by `clip`."""
        low, high = weight.amin(-1).clamp_max(0) * clip[0], weight.amax(-1).clamp_min(0) * clip[1]
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scales = ((high - low) / self.largest).half().float().clamp_min(MIN_SCALE_HALF)
        middle = torch.full_like(scales, (self.largest + 1) // 2)
        return scales, middle if self.symmetric else (-low / scales).round().clamp(0, self.largest)

    def nearest(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Return the nearest codes as f32. Scales and zero points are broadcast."""
        return (weight / scales + zeros).round().clamp(0, self.largest)

    def round(
        self, weight: Tensor, error: Callable[[Tensor], Tensor] | None = None
    ) -> QuantizedWeight:
        """Round every weight to its nearest code.

        `error` maps weight errors f32[out, num_groups, size] to one number per group. If given,
        each group's range is clipped to minimize it.
        """
        size = self.size(weight.shape[1])
        split = weight.view(len(weight), -1, size)
        scales, zeros = self.fit(split) if error is None else fit_min_error(self, split, error)
        codes = self.nearest(split, scales[..., None], zeros[..., None]).to(torch.uint8).flatten(1)
        groups = torch.arange(weight.shape[1], dtype=torch.int32) // size
        return QuantizedWeight(codes, scales, zeros.int(), groups)


@dataclass(frozen=True)
class PerChannelGrid:
    """i8 or f8_e4m3 codes with one scale per output channel."""

    codes: torch.dtype
    dtype: torch.dtype
    """Dtype of the scales in the checkpoint."""

    @property
    def largest(self) -> float:
        return 127.0 if self.codes == torch.int8 else float(torch.finfo(self.codes).max)

    def size(self, in_features: int) -> int:
        return in_features

    def clips(self) -> list[float]:
        """Return the factors of the scale to try. Nothing is clipped, because 8 bits cover the
        range. For float codes the position of a row's weights relative to powers of two matters,
        because codes are twice as dense below a power of two."""
        return [1.0] if self.codes == torch.int8 else [2 ** (i / OCTAVE) for i in range(OCTAVE)]

    def fit(self, weight: Tensor, clip: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return scales and zero points as `Grid.fit` does. Zero points are 0."""
        scales = (
            (clip * weight.abs().amax(-1) / self.largest)
            .to(self.dtype)
            .float()
            .clamp_min(MIN_SCALE)
        )
        return scales, torch.zeros_like(scales)

    def nearest(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        scaled = (weight / scales).clamp(-self.largest, self.largest)
        return scaled.round() if self.codes == torch.int8 else scaled.to(self.codes).float()

    def round(self, weight: Tensor) -> QuantizedWeight:
        """Round every weight to its nearest code."""
        scales, zeros = (t[:, None] for t in self.fit(weight))
        groups = torch.zeros(weight.shape[1], dtype=torch.int32)
        return QuantizedWeight(
            self.nearest(weight, scales, zeros).to(self.codes), scales, zeros.int(), groups
        )


def fit_min_error(
    grid: Grid | PerChannelGrid, weight: Tensor, error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points of the entry of `grid.clips()` with the smallest `error` of
    the weight errors."""
    best: tuple[Tensor, Tensor] | None = None
    for clip in grid.clips():
        scales, zeros = grid.fit(weight, clip)  # type: ignore[arg-type]
        broadcast = scales[..., None], zeros[..., None]
        errors = error((grid.nearest(weight, *broadcast) - broadcast[1]) * broadcast[0] - weight)
        if best is None:
            best, least = (scales, zeros), errors
        else:
            better = errors < least
            best = (torch.where(better, scales, best[0]), torch.where(better, zeros, best[1]))
            least = torch.where(better, errors, least)
    assert best is not None
    return best


def fake_quantize_per_token(x: Tensor, codes: torch.dtype) -> Tensor:
    """Quantize and dequantize x [..., in] with one scale per token."""
    largest = 127.0 if codes == torch.int8 else torch.finfo(codes).max
    scales = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(MIN_SCALE)
    scaled = (x / scales).clamp(-largest, largest)
    return (scaled.round() if codes == torch.int8 else scaled.to(codes).float()) * scales
