"""How checkpoints pack codes, and what the canonical form (interfaces/matmul.py) makes of them: the
same for many formats.

Of torch tensors, by their methods alone: the core imports no tensor library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.errors import CheckpointError
from dovetail.interfaces.quantization import LinearLayer

Array = Any


def unpack(words: Array, bits: int, axis: int, order: Sequence[int] | None = None) -> Array:
    """i32 words, each of 32 / `bits` codes of 4 or 8 bits along `axis` → u8, that many times as
    long there.

    The lowest bits come first. `order[i]`: the place, among a word's codes, of its i-th; by default
    i.
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
    """Unsigned codes `u8[out, in]` as a `WeightFormat` has them: of 4 bits two in a byte, of 8 bits
    less 128, `i8[out, in]`."""
    if bits == 8:
        return _shifted(codes)
    low, high = codes[:, 0::2].clone(), codes[:, 1::2]
    low[:, : high.shape[1]] |= high << 4  # of an odd number the last stands alone
    return low


def canonical_zeros(zeros: Array, bits: int) -> Array:
    """Zero points `u8[out, num_groups]` of unsigned codes as a `WeightFormat` has them."""
    return _shifted(zeros) if bits == 8 else zeros


def order_of_groups(layer: LinearLayer, name: str, g_idx: Array, group_size: int) -> Array:
    """`i64[in]`: a layer's inputs, group by group. `g_idx i32[num_parts, in]` has the group of
    each, and `name` is what follows the layer's in the checkpoint.

    Raises `CheckpointError` if parts differ, or a group has not `group_size` inputs.
    """
    if (g_idx != g_idx[0]).any():
        names = ", ".join(part.name for part in layer.parts)
        raise CheckpointError(
            f"{name} of {names} differ: layers that are computed as one need one order of their"
            " inputs"
        )
    groups, order = g_idx[0].sort(stable=True)
    if (groups != plain_groups(layer, groups, group_size)).any():
        raise CheckpointError(
            f"{layer.name}.{name} does not have {group_size} inputs in each of"
            f" {layer.in_features // group_size} groups: is group_size in quantization_config what"
            " the checkpoint was made with?"
        )
    return order


def plain_groups(layer: LinearLayer, like: Array, group_size: int) -> Array:
    """`[in]`, of the dtype and device of `like`: the group of each input, where one group follows
    the other."""
    return like.new_tensor(range(layer.in_features)) // group_size


def _shifted(codes: Array) -> Array:
    """From 0 … 255 to -128 … 127: u8 → i8."""
    return (codes.short() - 128).char()
