"""Convert weights to the layout of the kernels. A group of inputs takes `padded` places; the
padding is multiplied by zeros of x.

Words are i32[chunks, 16, out]. A chunk is 16 words of an output, each with `planes` codes: 8 of 4
bits, or 4 of 8 bits. Word j has the codes of places j, j + 16, j + 32, … of the chunk. 4-bit codes
are ordered so that the two codes of each pair are 16 bits apart, and one 32-bit operation converts
both. int8 codes and their zero points have an offset of 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.interfaces.matmul import WeightFormat

ROWS = 16
"""Number of words per output in a chunk: the minimum inner dimension of `tl.dot`."""
BLOCK_K = 128
"""Maximum number of places that `multiply_codes` processes per iteration."""
OUTS_AT_A_TIME = 2048
"""Number of outputs that are packed at a time, to limit temporary memory."""


@dataclass(frozen=True)
class Geometry:
    """The assignment of inputs to places."""

    in_features: int
    group: int
    """Number of inputs in a group."""
    padded: int
    """Number of places for them."""
    num_places: int

    @property
    def num_groups(self) -> int:
        """Number of groups, including those that pad the last chunk."""
        return self.num_places // self.padded


def multiplies_codes(format: WeightFormat) -> bool:
    """Return whether weights stay quantized and are multiplied by inputs quantized to the same
    type."""
    return format.inputs == format.codes and not format.zeros


def geometry(format: WeightFormat, in_features: int) -> Geometry:
    group = min(format.group_size or in_features, in_features)
    least, unit = (32, BLOCK_K) if multiplies_codes(format) else (ROWS, ROWS * planes(format))
    padded = max(least, 1 << (group - 1).bit_length())
    if padded > unit:
        padded = _up(group, unit)
    num_places = -(-in_features // group) * padded
    return Geometry(
        in_features,
        group,
        padded,
        num_places if multiplies_codes(format) else _up(num_places, unit),
    )


def planes(format: WeightFormat) -> int:
    return 32 // format.bits


def bits_of(plane: int, format: WeightFormat) -> int:
    """Return the bit offset of a plane's codes in a word."""
    return 4 * (plane // 2) + 16 * (plane % 2) if format.bits == 4 else 8 * plane


def nbytes(format: WeightFormat, in_features: int, out_features: int) -> int:
    at = geometry(format, in_features)
    groups = at.num_groups * (5 if format.zeros else 4)
    return out_features * (at.num_places * format.bits // 8 + groups) + (
        in_features * 8 if format.order else 0
    )


def packed(format: WeightFormat, in_features: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """Convert canonical codes to words or, if codes are multiplied directly, to `[out, places]` in
    their own type."""
    at, found = geometry(format, in_features), []
    for codes in torch.split(tensors["codes"], OUTS_AT_A_TIME):
        if format.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)[:, :in_features]
        codes = codes.view(torch.uint8)
        if multiplies_codes(format):
            found.append(_pad_groups(codes, at))
        else:
            found.append(
                _words(_pad_groups(codes ^ 128 if format.codes == "int8" else codes, at), format)
            )
    if multiplies_codes(format):
        return torch.cat(found).view(tensors["codes"].dtype)
    return torch.cat(found, 2)


def by_group(values: Tensor, at: Geometry) -> Tensor:
    """Transpose `[out, groups]` to `[groups, out]`, padded to `at.num_groups`."""
    return F.pad(values, (0, at.num_groups - values.shape[1])).T.contiguous()


def _words(codes: Tensor, format: WeightFormat) -> Tensor:
    count = planes(format)
    split = codes.view(len(codes), -1, count, ROWS)
    words = torch.zeros(len(codes), split.shape[1], ROWS, dtype=torch.int32, device=codes.device)
    for plane in range(count):
        words |= split[:, :, plane].int() << bits_of(plane, format)
    return words.permute(1, 2, 0).contiguous()


def _pad_groups(codes: Tensor, at: Geometry) -> Tensor:
    groups = F.pad(codes, (0, -at.in_features % at.group)).view(len(codes), -1, at.group)
    places = F.pad(groups, (0, at.padded - at.group)).flatten(1)
    return F.pad(places, (0, at.num_places - places.shape[1]))


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
