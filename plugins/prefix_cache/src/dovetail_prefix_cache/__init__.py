"""Prefix caching: a hash index of computed blocks. Opens a socket of its own, `eviction`, for the order of giving up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.hookspecs import hookimpl
from dovetail.provider import Options, Provider
from dovetail.sockets import Socket
from dovetail_prefix_cache.eviction import MakePolicy

if TYPE_CHECKING:
    from dovetail.compose import BuildContext
    from dovetail_prefix_cache.index import HashIndex


EVICTION = Socket(
    "eviction", "dovetail_eviction_policies", "which cached blocks to give up first", within="prefix_cache",
    interface=MakePolicy, contract_class="dovetail_prefix_cache.testing:EvictionContract",
    scaffold="dovetail_prefix_cache:scaffold/eviction",
)  # fmt: skip


def _hash(context: BuildContext, options: Options) -> HashIndex:
    from dovetail_prefix_cache.index import HashIndex

    make_policy: MakePolicy = context.build("eviction")
    return HashIndex(context.kv_groups[0].block_size, list(context.num_blocks), make_policy, context.name("eviction"))


def _lru(context: BuildContext, options: Options) -> MakePolicy:
    from dovetail_prefix_cache.eviction import LeastRecentlyUsed

    return LeastRecentlyUsed


def _lfu(context: BuildContext, options: Options) -> MakePolicy:
    from dovetail_prefix_cache.eviction import LeastFrequentlyUsed

    return LeastFrequentlyUsed


@hookimpl
def dovetail_sockets() -> list[Socket]:
    return [EVICTION]


@hookimpl
def dovetail_prefix_caches() -> list[Provider[HashIndex]]:
    return [Provider("hash", "blocks by chained, keyed 128-bit hashes; every hit is verified", _hash, priority=50)]


@hookimpl
def dovetail_eviction_policies() -> list[Provider[MakePolicy]]:
    return [
        Provider("lru", "least recently used, and of one sequence the last blocks first", _lru, priority=50),
        Provider("lfu", "least often used, among those the least recently", _lfu, priority=40),
    ]
