"""KV blocks in host memory: copied out of the device's cache and back, in the canonical layout,
before a step's kernels run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.errors import OutOfMemory
from dovetail.interfaces.attention import AttentionBackend, AttentionLayer
from dovetail.types import BlockOp, KVGroup


class CachedLayer(NamedTuple):
    """One layer's blocks on the device."""

    fixed: AttentionLayer
    backend: AttentionBackend
    cache: object


class HostLayer(NamedTuple):
    """One layer's blocks in host memory."""

    device: CachedLayer
    keys: Tensor
    """`[num_blocks, block_size, Hkv, D]`"""
    values: Tensor


class HostTier:
    """Per KV group, `num_blocks` blocks counted from 0."""

    def __init__(
        self,
        groups: list[KVGroup],
        num_blocks: list[int],
        layers: list[list[CachedLayer]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`layers`: by group. Raises `OutOfMemory`."""
        self._layers: list[list[HostLayer]] = []
        for group, count, cached in zip(groups, num_blocks, layers, strict=True):
            own = []
            for layer in cached:
                shape = (count, group.block_size, layer.fixed.num_kv_heads, layer.fixed.head_size)
                try:
                    # Page-locked: a GPU copies it without the processor's help.
                    pair = [
                        torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
                        for _ in range(2)
                    ]
                except (RuntimeError, MemoryError, OSError) as e:
                    raise OutOfMemory(
                        f"a host tier of {count} blocks could not be allocated: {e}"
                    ) from None
                own.append(HostLayer(layer, *pair))
            self._layers.append(own)

    def move(self, ops: list[BlockOp]) -> None:
        """Do the moves in order; adjacent blocks that do not overlap are moved in one go."""
        for run in _runs(ops):
            sources, targets = [op.src for op in run], [op.dst for op in run]
            for layer in self._layers[run[0].group]:
                if run[0].kind == "out":
                    keys, values = layer.device.backend.export_kv(layer.device.cache, sources)
                    layer.keys[targets], layer.values[targets] = keys.cpu(), values.cpu()
                else:
                    layer.device.backend.import_kv(
                        layer.device.cache, targets, layer.keys[sources], layer.values[sources]
                    )


def _runs(ops: Iterable[BlockOp]) -> Iterator[list[BlockOp]]:
    """Neighbours of one kind and group, of which no two have the same target."""
    run: list[BlockOp] = []
    targets: set[int] = set()
    for op in ops:
        if run and ((op.kind, op.group) != (run[0].kind, run[0].group) or op.dst in targets):
            yield run
            run, targets = [], set()
        run.append(op)
        targets.add(op.dst)
    if run:
        yield run
