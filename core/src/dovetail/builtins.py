"""The core's own plugin: the paged KV cache and two schedulers. It enters by the same door as every other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.hookspecs import hookimpl
from dovetail.interfaces.scheduler import SchedulerCapabilities
from dovetail.provider import KVCacheOptions, Provider, SchedulerOptions

if TYPE_CHECKING:
    from dovetail.compose import BuildContext
    from dovetail.kv_cache import PagedKVCache
    from dovetail.scheduler import TokenBudgetScheduler


def _paged(context: BuildContext, options: KVCacheOptions) -> PagedKVCache:
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
    return [Provider("paged", "blocks with reference counts, per KV group", _paged, KVCacheOptions, priority=50)]


@hookimpl
def dovetail_schedulers() -> list[Provider[TokenBudgetScheduler]]:
    return [
        Provider("fcfs", "first come, first served", _fcfs, SchedulerOptions, SchedulerCapabilities("arrival"), priority=50),
        Provider(
            "priority", "lower `priority` first, then first come", _priority, SchedulerOptions,
            SchedulerCapabilities("priority"), priority=40,
        ),
    ]  # fmt: skip
