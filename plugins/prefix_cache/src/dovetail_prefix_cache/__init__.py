"""Prefix caching: a hash index of computed blocks. Opens an extension point of its own, `eviction`,
for the order of giving up."""

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
    "which cached blocks to give up first",
    within="prefix_cache",
    interface=MakePolicy,
    contract_class="dovetail_prefix_cache.testing:EvictionContract",
    scaffold="dovetail_prefix_cache:scaffold/eviction",
)


def _settle(context: Context, options: TieredCacheOptions) -> tuple[TieredCacheOptions, list[str]]:
    asked, there = options.host_memory_gb, context.device.memory_bytes / 2**30
    if asked > there:
        raise ConfigError(
            f"prefix_cache.host_memory_gb: {asked:g} GiB is more than this machine has ({there:.1f}"
            " GiB)"
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
    summary = "blocks by chained, keyed 128-bit hashes; every hit is verified"
    return [
        Provider("hash", summary, _hash, TieredCacheOptions, resolve_options=_settle, priority=50)
    ]


@hookimpl
def dovetail_eviction_policies() -> list[Provider[MakePolicy]]:
    return [
        Provider(
            "lru",
            "least recently used, and of one sequence the last blocks first",
            _lru,
            priority=50,
        ),
        Provider("lfu", "least often used, among those the least recently", _lfu, priority=40),
    ]
