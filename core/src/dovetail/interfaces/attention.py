"""Paged attention: once a step and KV group `plan(batch)`, once a layer `run(...)`.

Words: B sequences, T tokens of the step, Hq query heads, Hkv key/value heads, D head size. An array
is a tensor of the provider's framework on its device. The batch is ragged: prefill, chunks of it
and decode are rows of one call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

Array = Any


@dataclass(frozen=True)
class AttentionCapabilities:
    """What a provider can do, as data: the core refuses what is not declared, with the reason."""

    framework: str = "torch"
    """Whose arrays q, k, v, `out`, the batch's and the exported ones are; what computes behind the
    seam is not asked."""
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    kv_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """KV storage types; the type of q, k, v and the output is one of `dtypes`. Those of one byte
    are "float8_e4m3fn" and "int8" (see `AttentionLayer.kv_scales`)."""
    head_sizes: tuple[int, ...] | None = None
    """None is any."""
    block_sizes: tuple[int, ...] | None = None
    """None is any."""
    blocks_per_sequence: int | None = None
    """Where the block size is left open: how many blocks should do for a sequence of maximum
    length. None: blocks of 16."""
    sliding_window: bool = False
    logit_soft_cap: bool = False
    sinks: bool = False
    graph_capture: bool = False
    """Launches of `run` can be captured (a CUDA graph) and replayed. For a step whose rows have one
    token each, all that differs between steps of equal `num_seqs` lies in buffers whose addresses
    stay, those of the batch included; the next `plan` of as many rows writes them, so that what was
    captured with an older plan then does the new step. The batch may hold rows of padding: one
    token at slot 0, `seq_lens` 1, whose output is nobody's."""
    batch_invariant: bool = False
    """Bitwise the same output for a token whatever else is in the batch and however its prompt was
    cut."""
    compiled_steps: bool = False
    """The backend is a `CompiledAttention`: its work can be part of a compiled step
    (interfaces/compiled.py)."""
    kv_layout: str = "NHD"
    """Name of the cache's layout. "NHD" is the canonical `[num_blocks, block_size, Hkv, D]`."""


def open_block_size(can: AttentionCapabilities, max_model_len: int) -> int:
    """The block size where the configuration leaves it open: 16, or the smallest power of two from
    16 to 256 with which `blocks_per_sequence` blocks hold `max_model_len` tokens (256 if none
    does)."""
    if can.blocks_per_sequence is None:
        return 16
    tokens = -(-max_model_len // can.blocks_per_sequence)
    return min(256, max(16, 1 << (tokens - 1).bit_length()))


@dataclass(frozen=True)
class AttentionLayer:
    """What is fixed for a layer."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    """Factor on q·k, before soft cap and softmax."""
    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it; None is all before it."""
    logit_soft_cap: float | None = None
    """cap * tanh(logit / cap)."""
    sinks: Array | None = field(default=None, compare=False)
    """f32[Hq]: a logit a head that takes part in the softmax and carries no value."""
    kv_scales: Array | None = field(default=None, compare=False)
    """f32[2]: what keys and what values are divided by when they are stored, and multiplied by when
    they are read, in a KV type of one byte. None: 1. What is stored is the nearest (even, if two
    are) of what the type holds, from -448 to 448 for "float8_e4m3fn" and from -127 to 127 for
    "int8"; NaN, which int8 does not hold, is then 0. Exported and imported is what is stored."""


@dataclass(frozen=True)
class KVCacheSpec:
    """The cache of one layer: both key and value hold `[num_blocks, block_size, Hkv, D]` in the
    canonical layout."""

    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: str


@dataclass
class AttentionBatch:
    """One step's rows in one KV group. Arrays live on the device; the lists are the same numbers on
    the host.

    The worker may hand out views of buffers that it reuses each step, so a plan is good for this
    step alone.
    """

    query_start: Array
    """i32[B + 1]: row b's tokens are `query_start[b] … query_start[b + 1] - 1` of the step."""
    seq_lens: Array
    """i32[B]: tokens of the sequence, this step's included; its last query token is at position
    `seq_lens - 1`."""
    block_table: Array
    """i32[B, max_blocks]: block ids in order. Entries past the sequence, or wholly before the
    window, are undefined."""
    slot_mapping: Array
    """i64[T]: slot (`block_id * block_size + offset`) that each token's key and value are written
    to."""
    host_query_start: list[int]
    host_seq_lens: list[int]

    num_seqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int


class AttentionBackend(Protocol):
    """What an attention provider builds: one object an engine; it holds the workspace, not the
    cache."""

    def allocate_cache(self, spec: KVCacheSpec) -> Any:
        """Return one layer's cache, in the provider's own layout. Called once a layer, when memory
        is sized."""

    def plan(self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int) -> Any:
        """Prepare a step (splits, index arrays) for the layers of a group. Good until the next
        `plan` of the group."""

    def run(
        self, layer: AttentionLayer, q: Array, k: Array, v: Array, cache: Any, plan: Any, out: Array
    ) -> None:
        """Write `k, v [T, Hkv, D]` to the cache at the step's slots, then attend: `q [T, Hq, D]` →
        `out [T, Hq, D]`.

        All of the step's keys and values are written before any is read: rows of one step may share
        blocks. Reads no slot outside a row's sequence and window, writes none but the step's slots.
        Softmax and sums in float32.
        """

    def export_kv(
        self, cache: Any, block_ids: list[int], out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        """Return keys and values of some blocks in the canonical layout, each `[len(block_ids),
        block_size, Hkv, D]`.

        With `out`, two arrays of that shape on any device (say, of a host tier), they are written
        there and `out` is returned. Since contract 0.2.
        """

    def import_kv(self, cache: Any, block_ids: list[int], keys: Array, values: Array) -> None:
        """Write blocks given in the canonical layout."""


CONTRACT = "0.2"
