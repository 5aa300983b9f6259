from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any, Protocol
Array = Any

@dataclass(frozen=True)
class AttentionCapabilities:
    framework: str = 'torch'
    devices: tuple[str, ...] = ('cpu',)
    dtypes: tuple[str, ...] = ('float32', 'bfloat16', 'float16')
    kv_dtypes: tuple[str, ...] = ('float32', 'bfloat16', 'float16')
    head_sizes: tuple[int, ...] | None = None
    block_sizes: tuple[int, ...] | None = None
    blocks_per_sequence: int | None = None
    sliding_window: bool = False
    logit_soft_cap: bool = False
    sinks: bool = False
    graph_capture: bool = False
    batch_invariant: bool = False
    compiled_steps: bool = False
    kv_layout: str = 'NHD'

def open_block_size(can: AttentionCapabilities, max_model_len: int) -> int:
    ...

@dataclass(frozen=True)
class AttentionLayer:
    index: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    logit_soft_cap: float | None = None
    sinks: Array | None = field(default=None, compare=False)
    kv_scales: Array | None = field(default=None, compare=False)

@dataclass(frozen=True)
class KVCacheSpec:
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: str

@dataclass
class AttentionBatch:
    query_start: Array
    seq_lens: Array
    block_table: Array
    slot_mapping: Array
    host_query_start: list[int]
    host_seq_lens: list[int]
    num_seqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int

class AttentionBackend(Protocol):

    def allocate_cache(self, spec: KVCacheSpec) -> Any:
        ...

    def plan(self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int) -> Any:
        ...

    def run(self, layer: AttentionLayer, q: Array, k: Array, v: Array, cache: Any, plan: Any, out: Array) -> None:
        ...

    def export_kv(self, cache: Any, block_ids: list[int], out: tuple[Array, Array] | None=None) -> tuple[Array, Array]:
        ...

    def import_kv(self, cache: Any, block_ids: list[int], keys: Array, values: Array) -> None:
        ...
CONTRACT = '0.2'
