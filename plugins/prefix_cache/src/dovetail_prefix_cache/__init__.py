"""Register the prefix cache, a hash index of computed blocks, and the extension point `eviction`,
which sets the eviction order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.errors import ConfigError
from dovetail.plugin.extension_points import ExtensionPoint
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider, TieredCacheOptions
from dovetail_prefix_cache.eviction import MakePolicy

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_prefix_cache.index import HashIndex


EVICTION = ExtensionPoint(
    "eviction",
    "dovetail_eviction_policies",
    "which cached blocks to evict first",
    within="prefix_cache",
    interface=MakePolicy,
    contract_class="dovetail_prefix_cache.testing:EvictionContract",
    scaffold="dovetail_prefix_cache:scaffold/eviction",
)


def _resolve_options(
    context: Context, options: TieredCacheOptions
) -> tuple[TieredCacheOptions, list[str]]:
    requested, available = options.host_memory_gb, context.device.memory_bytes / 2**30
    if requested > available:
        raise ConfigError(
            f"prefix_cache.host_memory_gb: {requested:g} GiB is more than this machine has"
            f" ({available:.1f} GiB)"
        )
    return options, []


def _hash(context: BuildContext, options: TieredCacheOptions) -> HashIndex:
    from dovetail_prefix_cache.index import HashIndex

    make_policy: MakePolicy = context.build("eviction")
    sizes = list(context.num_blocks), make_policy, context.name("eviction"), context.num_host_blocks
    return HashIndex(context.kv_groups[0].block_size, *sizes)


def _lru(context: BuildContext, options: Options) -> MakePolicy:
    from dovetail_prefix_cache.eviction import LeastRecentlyUsed

    return LeastRecentlyUsed


def _lfu(context: BuildContext, options: Options) -> MakePolicy:
    from dovetail_prefix_cache.eviction import LeastFrequentlyUsed

    return LeastFrequentlyUsed


@hookimpl
def dovetail_extension_points() -> list[ExtensionPoint]:
    return [EVICTION]


@hookimpl
def dovetail_prefix_caches() -> list[Provider[HashIndex]]:
    summary = "finds blocks by chained, keyed 128-bit hashes and verifies every hit"
    return [
        Provider(
            "hash",
            summary,
            _hash,
            TieredCacheOptions,
            resolve_options=_resolve_options,
            priority=50,
        )
    ]


@hookimpl
def dovetail_eviction_policies() -> list[Provider[MakePolicy]]:
    return [
        Provider(
            "lru",
            "evicts the least recently used block; within a sequence, the last blocks first",
            _lru,
            priority=50,
        ),
        Provider(
            "lfu",
            "evicts the least frequently used block; among equals, the least recently used",
            _lfu,
            priority=40,
        ),
    ]
