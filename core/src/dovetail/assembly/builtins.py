"""Register the core's own plugin: paged KV cache, three schedulers, and unquantized weights. It is
registered like any other plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.quantization import PLAIN, QuantizationCapabilities
from dovetail.interfaces.scheduler import SchedulerCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import (
    KVCacheOptions,
    LongestPrefixOptions,
    Provider,
    SchedulerOptions,
)

if TYPE_CHECKING:
    from dovetail.engine.kv_cache import PagedKVCache
    from dovetail.engine.longest_prefix import LongestPrefixScheduler
    from dovetail.engine.scheduler import TokenBudgetScheduler
    from dovetail.plugin.build_context import BuildContext


PLAIN_WEIGHTS = QuantizationCapabilities(
    methods=(PLAIN,), devices=None, dtypes=None, compiled_steps=True
)


def _unquantized(context: BuildContext, options: object) -> None:
    """Build nothing: the worker's own layers need no scheme."""


def _paged(context: BuildContext, options: KVCacheOptions) -> PagedKVCache:
    from dovetail.engine.kv_cache import PagedKVCache

    return PagedKVCache(
        list(context.kv_groups),
        list(context.num_blocks),
        context.prefix_cache,
        list(context.num_host_blocks) or None,
    )


def _fcfs(context: BuildContext, options: SchedulerOptions) -> TokenBudgetScheduler:
    from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs

    assert context.kv is not None
    return TokenBudgetScheduler(context.kv, fcfs, **options.model_dump())


def _priority(context: BuildContext, options: SchedulerOptions) -> TokenBudgetScheduler:
    from dovetail.engine.scheduler import TokenBudgetScheduler, priority

    assert context.kv is not None
    return TokenBudgetScheduler(context.kv, priority, **options.model_dump())


def _longest_prefix(context: BuildContext, options: LongestPrefixOptions) -> LongestPrefixScheduler:
    from dovetail.engine.longest_prefix import LongestPrefixScheduler

    assert context.kv is not None
    return LongestPrefixScheduler(context.kv, **options.model_dump())


@hookimpl
def dovetail_quantization() -> list[Provider[None]]:
    summary = "unquantized weights: the worker's own linear layers"
    return [Provider("none", summary, _unquantized, capabilities=PLAIN_WEIGHTS)]


@hookimpl
def dovetail_kv_caches() -> list[Provider[PagedKVCache]]:
    return [
        Provider(
            "paged",
            "paged blocks with reference counts, per KV group",
            _paged,
            KVCacheOptions,
            priority=50,
        )
    ]


@hookimpl
def dovetail_schedulers() -> list[Provider[TokenBudgetScheduler]]:
    return [
        Provider(
            "fcfs",
            "first come, first served",
            _fcfs,
            SchedulerOptions,
            SchedulerCapabilities("arrival"),
            priority=50,
        ),
        Provider(
            "priority",
            "lower `priority` first, then first come, first served",
            _priority,
            SchedulerOptions,
            SchedulerCapabilities("priority"),
            priority=40,
        ),
        Provider(
            "longest-prefix",
            "longest cached prefix first, without starvation; then first come, first served",
            _longest_prefix,
            LongestPrefixOptions,
            priority=30,
        ),
    ]
