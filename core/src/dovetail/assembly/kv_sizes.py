"""Compute the number of blocks of each KV group, on the device and in host memory."""

from __future__ import annotations

from dovetail.engine.block_pool import blocks_per_sequence
from dovetail.errors import ConfigError, OutOfMemory
from dovetail.plan import Plan
from dovetail.plugin.provider import HOST_MEMORY
from dovetail.types import KVGroup


def size_cache(
    plan: Plan, groups: list[KVGroup], memory: int, max_num_seqs: int, chunk: int
) -> list[int]:
    """Return the blocks per group that fit into `memory` bytes. Raises `OutOfMemory` if one
    sequence of maximum length does not fit."""
    num_blocks = size_groups(groups, memory, plan.max_model_len, max_num_seqs, chunk)
    needed = [blocks_per_sequence(g, plan.max_model_len, chunk) for g in groups]
    if all(n - 1 >= need for n, need in zip(num_blocks, needed, strict=True)):
        return num_blocks
    full_bytes = sum(n * g.bytes_per_block for n, g in zip(needed, groups, strict=True))
    fits = plan.max_model_len
    while (
        fits > 1
        and sum(blocks_per_sequence(g, fits, chunk) * g.bytes_per_block for g in groups) > memory
    ):
        fits = fits * 3 // 4
    raise OutOfMemory(
        f"the KV cache has {memory / 2**20:.0f} MiB, but one sequence of max_model_len"
        f" {plan.max_model_len} tokens needs {full_bytes / 2**20:.0f} MiB: lower max_model_len to"
        f" {fits}, or raise kv_cache.memory_fraction or kv_cache.memory_gb"
    )


def size_host_tier(plan: Plan, groups: list[KVGroup], num_blocks: list[int]) -> list[int]:
    """Return the blocks per group of the host tier, in the same proportions as on the device; an
    empty list without a host tier."""
    choice = plan.choices.get("prefix_cache")
    gigabytes = 0.0 if choice is None else choice.options.get(HOST_MEMORY, 0.0)
    if not gigabytes:
        return []
    ratio = (
        gigabytes
        * 2**30
        / sum((n - 1) * g.bytes_per_block for n, g in zip(num_blocks, groups, strict=True))
    )
    num_host_blocks = [int((n - 1) * ratio) for n in num_blocks]
    if min(num_host_blocks) < 1:
        least = sum(g.bytes_per_block for g in groups) / 2**30
        raise ConfigError(
            f"prefix_cache.{HOST_MEMORY}: {gigabytes:g} GiB hold less than one block per KV group;"
            f" set at least {least:.3g}"
        )
    return num_host_blocks


def size_groups(
    groups: list[KVGroup], memory: int, max_model_len: int, max_num_seqs: int, chunk: int
) -> list[int]:
    """Split `memory` bytes among the groups; return blocks per group, the null block included.

    The blocks of each group are proportional to what a sequence of maximum length needs, so that
    all groups run out together, and no more than `max_num_seqs` such sequences can use. `chunk` is
    the token budget of a step: a sliding group holds a window and the tokens of two steps (one may
    be in flight), not the whole sequence.
    """
    per_seq = [blocks_per_sequence(g, max_model_len, chunk) for g in groups]
    seq_bytes = sum(n * g.bytes_per_block for n, g in zip(per_seq, groups, strict=True))
    num_seqs = min(memory / seq_bytes, float(max_num_seqs))
    return [1 + int(n * num_seqs) for n in per_seq]
