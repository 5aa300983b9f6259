"""Define paged attention: `plan(batch)` once per step and KV group, `run(...)` once per layer.

Symbols: B sequences, T tokens of the step, Hq query heads, Hkv key/value heads, D head size. An
array is a tensor of the provider's framework on its device. The batch is ragged: full prefills,
prefill chunks and decode tokens are rows of one call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

Array = Any


@dataclass(frozen=True)
class AttentionCapabilities:
    """Capabilities of an attention provider, as data. The core rejects what is not declared, with
    the reason."""

    framework: str = "torch"
    """Framework of the arrays: q, k, v, `out`, those of the batch and exported KV. The provider may
    compute with anything behind this interface."""
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    kv_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """Dtypes in which KV can be stored; q, k, v and the output have one of `dtypes`. The one-byte
    types are "float8_e4m3fn" and "int8" (see `AttentionLayer.kv_scales`)."""
    head_sizes: tuple[int, ...] | None = None
    """Supported head sizes; None means any."""
    block_sizes: tuple[int, ...] | None = None
    """Supported block sizes; None means any."""
    blocks_per_sequence: int | None = None
    """Number of blocks that should suffice for a sequence of maximum length, if the engine config
    does not set the block size. None: the block size is 16."""
    sliding_window: bool = False
    logit_soft_cap: bool = False
    sinks: bool = False
    graph_capture: bool = False
    """Launches of `run` can be captured (a CUDA graph) and replayed.

    For a step whose rows have one token each, everything that differs between steps of equal
    `num_seqs` lies in buffers with stable addresses, those of the batch included. The next `plan`
    with as many rows overwrites them, so that a graph captured with an older plan computes the new
    step. The batch may contain padding rows: one token at slot 0, `seq_lens` 1, whose output is
    ignored."""
    batch_invariant: bool = False
    """The output for a token is bitwise identical whatever else is in the batch and however its
    prompt was split into chunks."""
    compiled_steps: bool = False
    """The backend is a `CompiledAttention`: it can be part of a compiled step
    (interfaces/compiled.py)."""
    kv_layout: str = "NHD"
    """Name of the cache's layout. "NHD" is the canonical `[num_blocks, block_size, Hkv, D]`."""


def open_block_size(can: AttentionCapabilities, max_model_len: int) -> int:
    """Return the block size to use if the engine config does not set one: 16, or the smallest power
    of two from 16 to 256 with which `blocks_per_sequence` blocks hold `max_model_len` tokens (256
    if none does)."""
    if can.blocks_per_sequence is None:
        return 16
    tokens = -(-max_model_len // can.blocks_per_sequence)
    return min(256, max(16, 1 << (tokens - 1).bit_length()))


@dataclass(frozen=True)
class AttentionLayer:
    """Constants of one attention layer."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    """Factor applied to q·k before soft cap and softmax."""
    window: int | None = None
    """Window in tokens: a token attends to itself and the `window - 1` tokens before it. None means
    all tokens before it."""
    logit_soft_cap: float | None = None
    """Soft cap on logits: cap * tanh(logit / cap)."""
    sinks: Array | None = field(default=None, compare=False)
    """f32[Hq]: one logit per head that takes part in the softmax and carries no value."""
    kv_scales: Array | None = field(default=None, compare=False)
    """f32[2], for one-byte KV dtypes: the scales of keys and of values. Values are divided by the
    scale when stored and multiplied by it when read; None means 1. The stored value is the nearest
    (ties to even) that the type can represent, from -448 to 448 for "float8_e4m3fn" and from -127
    to 127 for "int8"; NaN becomes 0 in int8. Export and import use stored values."""


@dataclass(frozen=True)
class KVCacheSpec:
    """Shape of the cache of one layer: keys and values are `[num_blocks, block_size, Hkv, D]` each
    in the canonical layout."""

    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: str


@dataclass
class AttentionBatch:
    """The rows of one step in one KV group. Arrays are on the device; the lists have the same
    numbers on the host.

    The worker may pass views of buffers that it reuses in each step, so a plan is valid for this
    step only.
    """

    query_start: Array
    """i32[B + 1]: tokens of row b are `query_start[b] … query_start[b + 1] - 1` of the step."""
    seq_lens: Array
    """i32[B]: length of the sequence, this step's tokens included; its last query token is at
    position `seq_lens - 1`."""
    block_table: Array
    """i32[B, max_blocks]: block ids in order. Entries beyond the sequence, or entirely before the
    window, are undefined."""
    slot_mapping: Array
    """i64[T]: slot (`block_id * block_size + offset`) to which the key and value of each token are
    written."""
    host_query_start: list[int]
    host_seq_lens: list[int]

    num_seqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int


class AttentionBackend(Protocol):
    """The object that an attention provider builds; one object per engine. It owns the workspace,
    not the cache."""

    def allocate_cache(self, spec: KVCacheSpec) -> Any:
        """Return the cache of one layer, in the provider's own layout. Called once per layer, when
        the size of the KV cache is known."""

    def plan(self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int) -> Any:
        """Prepare a step (splits, index arrays) for the layers of a group. The result is valid
        until the next `plan` for the group."""

    def run(
        self, layer: AttentionLayer, q: Array, k: Array, v: Array, cache: Any, plan: Any, out: Array
    ) -> None:
        """Write `k, v [T, Hkv, D]` to the cache at the step's slots, then attend: `q [T, Hq, D]` →
        `out [T, Hq, D]`.

        All keys and values of the step are written before any is read, because rows of one step may
        share blocks. Only slots of a row's sequence and window are read, and only the step's slots
        are written. Softmax and sums are computed in float32.
        """

    def export_kv(
        self, cache: Any, block_ids: list[int], out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        """Return keys and values of the given blocks in the canonical layout, each
        `[len(block_ids), block_size, Hkv, D]`.

        With `out`, two arrays of that shape on any device (for example of a host tier), they are
        written there and `out` is returned. Since contract 0.2.
        """

    def import_kv(self, cache: Any, block_ids: list[int], keys: Array, values: Array) -> None:
        """Write blocks that are given in the canonical layout."""


CONTRACT = "0.2"
