"""From weights to codes: grids of integers and of floats, by row or by group of inputs, and
rounding to nearest.

weight[o, i] = scales[o, groups[i]] * (codes[o, i] - zeros[o, groups[i]])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
SMALLEST = 1e-8
"""Of a scale: weights that are all zero have one too."""
SMALLEST_HALF = 2**-20
"""The same in float16."""
CLIPS = tuple(1 - 0.07 * i for i in range(6))
"""Of an end of a range: how much of it to keep."""
OCTAVE = 8
"""Scales of floats that are tried between one power of two and the next."""


@dataclass(frozen=True)
class Rounded:
    """A weight `[out, in]` in codes. What `weight` gives is what every reader of the checkpoint
    computes with."""

    codes: Tensor
    """[out, in]: u8 below 2 ** bits, i8, or f8_e4m3."""
    scales: Tensor
    """f32[out, num_groups], of values that the checkpoint's type holds exactly."""
    zeros: Tensor
    """i32[out, num_groups]"""
    groups: Tensor
    """i32[in]: the group of each input."""

    def weight(self) -> Tensor:
        """f32[out, in]"""
        index = self.groups.long()
        return (self.codes.float() - self.zeros.float()[:, index]) * self.scales[:, index]

    def rows(self, begin: int, end: int) -> Rounded:
        """Some of the outputs."""
        return replace(
            self,
            codes=self.codes[begin:end],
            scales=self.scales[begin:end],
            zeros=self.zeros[begin:end],
        )


@dataclass(frozen=True)
class Grid:
    """Unsigned integers of `bits` bits, with a scale and a zero point for each group of inputs."""

    bits: int
    group_size: int
    """-1: all inputs."""
    symmetric: bool
    """The zero point is in the middle, whatever the weights."""

    @property
    def codes(self) -> torch.dtype:
        return torch.uint8

    @property
    def largest(self) -> int:
        return (1 << self.bits) - 1

    def size(self, in_features: int) -> int:
        """Inputs in a group."""
        return in_features if self.group_size == -1 else self.group_size

    def clips(self) -> list[tuple[float, float]]:
        """What to try of a range: how much of its low and of its high end to keep."""
        return (
            [(c, c) for c in CLIPS]
            if self.symmetric
            else [(low, high) for low in CLIPS for high in CLIPS]
        )

    def fit(self, weight: Tensor, clip: tuple[float, float] = (1.0, 1.0)) -> tuple[Tensor, Tensor]:
        """Scales and zero points f32[...] that span the last axis of `weight` [..., size], or a
        part of that range."""
        low, high = weight.amin(-1).clamp_max(0) * clip[0], weight.amax(-1).clamp_min(0) * clip[1]
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scales = ((high - low) / self.largest).half().float().clamp_min(SMALLEST_HALF)
        middle = torch.full_like(scales, (self.largest + 1) // 2)
        return scales, middle if self.symmetric else (-low / scales).round().clamp(0, self.largest)

    def nearest(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Codes, as f32; scales and zero points are broadcast."""
        return (weight / scales + zeros).round().clamp(0, self.largest)

    def round(self, weight: Tensor, error: Callable[[Tensor], Tensor] | None = None) -> Rounded:
        """Every weight to its nearest code. `error`: of differences f32[out, num_groups, size], a
        number for each group; if given, each group's range is clipped to where it is least."""
        size = self.size(weight.shape[1])
        split = weight.view(len(weight), -1, size)
        scales, zeros = self.fit(split) if error is None else fit_least(self, split, error)
        codes = self.nearest(split, scales[..., None], zeros[..., None]).to(torch.uint8).flatten(1)
        groups = torch.arange(weight.shape[1], dtype=torch.int32) // size
        return Rounded(codes, scales, zeros.int(), groups)


@dataclass(frozen=True)
class RowGrid:
    """i8 or f8_e4m3 codes, with a scale for each output."""

    codes: torch.dtype
    dtype: torch.dtype
    """Of the scales in the checkpoint."""

    @property
    def largest(self) -> float:
        return 127.0 if self.codes == torch.int8 else float(torch.finfo(self.codes).max)

    def size(self, in_features: int) -> int:
        return in_features

    def clips(self) -> list[float]:
        """What to try of a scale. Nothing is clipped: eight bits reach far enough. But where a
        row's weights lie between the powers of two, below which the codes of floats are twice as
        dense, matters."""
        return [1.0] if self.codes == torch.int8 else [2 ** (i / OCTAVE) for i in range(OCTAVE)]

    def fit(self, weight: Tensor, clip: float = 1.0) -> tuple[Tensor, Tensor]:
        """As `Grid.fit`; zero points are 0."""
        scales = (
            (clip * weight.abs().amax(-1) / self.largest).to(self.dtype).float().clamp_min(SMALLEST)
        )
        return scales, torch.zeros_like(scales)

    def nearest(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        scaled = (weight / scales).clamp(-self.largest, self.largest)
        return scaled.round() if self.codes == torch.int8 else scaled.to(self.codes).float()

    def round(self, weight: Tensor) -> Rounded:
        """Every weight to its nearest code."""
        scales, zeros = (t[:, None] for t in self.fit(weight))
        groups = torch.zeros(weight.shape[1], dtype=torch.int32)
        return Rounded(
            self.nearest(weight, scales, zeros).to(self.codes), scales, zeros.int(), groups
        )


def fit_least(
    grid: Grid | RowGrid, weight: Tensor, error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """As the grid's `fit`, with that of its `clips` with which the `error` of the difference that
    rounding makes is least."""
    best: tuple[Tensor, Tensor] | None = None
    for clip in grid.clips():
        scales, zeros = grid.fit(weight, clip)  # type: ignore[arg-type]
        spread = scales[..., None], zeros[..., None]
        found = error((grid.nearest(weight, *spread) - spread[1]) * spread[0] - weight)
        if best is None:
            best, least = (scales, zeros), found
        else:
            better = found < least
            best = (torch.where(better, scales, best[0]), torch.where(better, zeros, best[1]))
            least = torch.where(better, found, least)
    assert best is not None
    return best


def inputs_by_token(x: Tensor, codes: torch.dtype) -> Tensor:
    """x [..., in] as a layer sees it that rounds each token's inputs by a scale of their own."""
    largest = 127.0 if codes == torch.int8 else torch.finfo(codes).max
    scales = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(SMALLEST)
    scaled = (x / scales).clamp(-largest, largest)
    return (scaled.round() if codes == torch.int8 else scaled.to(codes).float()) * scales
