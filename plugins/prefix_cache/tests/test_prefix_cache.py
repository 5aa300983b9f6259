"""Test both eviction policies, and the hash index with each of them, against their contracts."""

from typing import ClassVar

from dovetail.plugin.provider import Provider
from dovetail_prefix_cache import dovetail_eviction_policies, dovetail_prefix_caches
from dovetail_prefix_cache.testing import EvictionContract
from dovetail_testing.prefix_cache import PrefixCacheContract

(HASH,) = dovetail_prefix_caches()
LRU, LFU = dovetail_eviction_policies()


class TestHashLru(PrefixCacheContract):
    provider = HASH
    inner: ClassVar[dict[str, Provider]] = {"eviction": LRU}


class TestHashLfu(PrefixCacheContract):
    provider = HASH
    inner: ClassVar[dict[str, Provider]] = {"eviction": LFU}


class TestLru(EvictionContract):
    provider = LRU


class TestLfu(EvictionContract):
    provider = LFU
