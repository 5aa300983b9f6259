"""The core's own plugin: the paged KV cache and two schedulers. It enters by the same door as every other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dovetail.hookspecs import hookimpl
from dovetail.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.compose import BuildContext
    from dovetail.kv_cache import PagedKVCache
    from dovetail.scheduler import TokenBudgetScheduler


class PagedOptions(Options):
    block_size: int = Field(16, ge=1, le=256, description="tokens in a block")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto is the model's")
    memory_fraction: float = Field(0.9, gt=0, le=1, description="share of the free memory that the engine may take")
    memory_gb: float | None = Field(None, gt=0, description="GiB for the cache, instead of a share of the memory")


class SchedulerOptions(Options):
    max_num_seqs: int = Field(256, ge=1, description="sequences that run at a time")
    max_num_batched_tokens: int = Field(2048, ge=1, description="tokens in a step")


def _paged(context: BuildContext, options: PagedOptions) -> PagedKVCache:
    from dovetail.kv_cache import PagedKVCache

    return PagedKVCache(list(context.kv_groups), list(context.num_blocks))


def _fcfs(context: BuildContext, options: SchedulerOptions) -> TokenBudgetScheduler:
    from dovetail.scheduler import TokenBudgetScheduler, fcfs

    assert context.kv is not None
    return TokenBudgetScheduler(context.kv, fcfs, **options.model_dump())


def _priority(context: BuildContext, options: SchedulerOptions) -> TokenBudgetScheduler:
    from dovetail.scheduler import TokenBudgetScheduler, priority

    assert context.kv is not None
    return TokenBudgetScheduler(context.kv, priority, **options.model_dump())


@hookimpl
def dovetail_kv_caches() -> list[Provider[PagedKVCache]]:
    return [Provider("paged", "blocks with reference counts, per KV group", _paged, PagedOptions, priority=50)]


@hookimpl
def dovetail_schedulers() -> list[Provider[TokenBudgetScheduler]]:
    return [
        Provider("fcfs", "first come, first served", _fcfs, SchedulerOptions, priority=50),
        Provider("priority", "lower `priority` first, then first come", _priority, SchedulerOptions, priority=40),
    ]
