"""Unpack the codes of checkpoints into the canonical form of `interfaces/matmul.py`. Many formats
share these functions.

They use only methods of torch tensors, because the core imports no tensor library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.errors import CheckpointError
from dovetail.interfaces.quantization import LinearLayer

Array = Any


def unpack(words: Array, bits: int, axis: int, order: Sequence[int] | None = None) -> Array:
    """Unpack i32 words, each of 32 / `bits` codes of 4 or 8 bits along `axis`, to u8, with that
    axis longer by the same factor.

    The lowest bits come first. `order[i]` is the position, among a word's codes, of the i-th code;
    by default i.
    """
    moved = words.movedim(axis, -1)
    octets = (
        moved.reshape(-1).view(words[:0].byte().dtype).reshape(*moved.shape[:-1], -1)
    )  # little-endian, as the files are
    codes = (
        octets if bits == 8 else (octets[..., None] >> octets.new_tensor([0, 4]) & 15).flatten(-2)
    )
    if order is not None:
        places = [order.index(i) for i in range(len(order))]
        codes = codes.unflatten(-1, (-1, len(order)))[..., places].flatten(-2)
    return codes.movedim(-1, axis)


def canonical_codes(codes: Array, bits: int) -> Array:
    """Convert unsigned codes `u8[out, in]` to those of a `WeightFormat`: 4-bit codes are packed two
    per byte; from 8-bit codes 128 is subtracted, giving `i8[out, in]`."""
    if bits == 8:
        return _shifted(codes)
    low, high = codes[:, 0::2].clone(), codes[:, 1::2]
    low[:, : high.shape[1]] |= high << 4  # for an odd number of inputs the last byte has one code
    return low


def canonical_zeros(zeros: Array, bits: int) -> Array:
    """Convert zero points `u8[out, num_groups]` of unsigned codes to those of a `WeightFormat`."""
    return _shifted(zeros) if bits == 8 else zeros


def order_of_groups(layer: LinearLayer, name: str, g_idx: Array, group_size: int) -> Array:
    """Return a layer's inputs sorted by group, `i64[in]`. `g_idx i32[num_parts, in]` has the group
    of each input, and `name` is its tensor name in the checkpoint without the layer's name.

    Raises `CheckpointError` if the parts differ, or if a group does not have `group_size` inputs.
    """
    if (g_idx != g_idx[0]).any():
        names = ", ".join(part.name for part in layer.parts)
        raise CheckpointError(
            f"{name} of {names} differ: layers that are fused into one must have the same order of"
            " inputs"
        )
    groups, order = g_idx[0].sort(stable=True)
    if (groups != plain_groups(layer, groups, group_size)).any():
        raise CheckpointError(
            f"{layer.name}.{name} does not have {group_size} inputs in each of"
            f" {layer.in_features // group_size} groups: check that group_size in"
            " quantization_config is the value that the checkpoint was quantized with"
        )
    return order


def plain_groups(layer: LinearLayer, like: Array, group_size: int) -> Array:
    """Return the group of each input, `[in]`, with consecutive groups. The result has the dtype and
    device of `like`."""
    return like.new_tensor(range(layer.in_features)) // group_size


def _shifted(codes: Array) -> Array:
    """Map u8 0 … 255 to i8 -128 … 127."""
    return (codes.short() - 128).char()
