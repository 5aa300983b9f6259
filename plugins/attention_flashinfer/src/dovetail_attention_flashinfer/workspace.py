"""Compute the device memory that FlashInfer needs for partial results of the largest step, with the
formulas of its planners."""

from __future__ import annotations

from dovetail_attention_flashinfer.work import Geometry

FLOAT = 4
"""Bytes per number: partial results are float32."""
ALIGNMENT = 16
"""Alignment in bytes of each of the two arrays."""
PROGRAMS_PER_SM, THREADS_PER_SM, DECODE_THREADS = 2, 2048, 128
"""Thread blocks per multiprocessor that the prefill planner assumes; threads per multiprocessor and
per block, which bound the thread blocks of the decode kernels."""


def workspace_bytes(geometry: Geometry, num_rows: int, num_sms: int) -> int:
    """Return the bytes for any step of at most `num_rows` rows.

    From `PrefillPlan`, `PrefillSplitQOKVIndptr` and `DecodePlan` of FlashInfer 0.6.13
    (flashinfer/attention/scheduler.cuh). A planner reserves, for each query head and each of
    `padded` tiles of `tile` query rows, a vector and a logarithm: `heads * padded * tile *
    (head_size + 1) * 4` bytes. With `programs = 2 * num_sms // kv_heads`:

    - decode on tensor cores in graph mode: `padded = max(programs, ceil(num_rows * group / tile) +
      num_rows - 1)`, because graph mode always splits contexts, and `tile` is the smallest of 16,
      64 and 128 that is at least a group;
    - decode without tensor cores: `padded` is the number of thread blocks the GPU can hold, over
      `kv_heads`, and `tile` is 1;
    - prefill, which splits contexts only if its tiles are fewer than `programs`: `padded =
      programs`, `tile = 128`.

    64 query heads of 128 with 8 KV heads, 256 rows: 383 tiles of 16, which is 193 MiB.
    """
    programs = PROGRAMS_PER_SM * num_sms // geometry.num_kv_heads
    rows = [programs * query_tile(geometry, 128)]
    if geometry.uses_tensor_cores:
        tile = query_tile(geometry, geometry.group)
        rows.append(max(programs, -(-num_rows * geometry.group // tile) + num_rows - 1) * tile)
    else:
        rows.append(THREADS_PER_SM // DECODE_THREADS * num_sms // geometry.num_kv_heads)
    return geometry.num_heads * max(rows) * (geometry.head_size + 1) * FLOAT + 2 * ALIGNMENT


def query_tile(geometry: Geometry, num_queries: int) -> int:
    """Return the number of query tokens * heads of a group in a tile, if a row has `num_queries` of
    them (`FA2DetermineCtaTileQ`)."""
    if num_queries > 64 and geometry.head_size < 256:
        return 128
    return 64 if num_queries > 16 else 16
