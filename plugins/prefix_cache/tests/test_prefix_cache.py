"""Both eviction policies under the hash index keep the contract of prefix caches."""

from dovetail.provider import Provider
from dovetail.testing.prefix_cache import PrefixCacheContract
from dovetail_prefix_cache import dovetail_eviction_policies, dovetail_prefix_caches

(HASH,) = dovetail_prefix_caches()
LRU, LFU = dovetail_eviction_policies()


class TestHashLru(PrefixCacheContract):
    provider: Provider = HASH
    inner = {"eviction": LRU}


class TestHashLfu(PrefixCacheContract):
    provider: Provider = HASH
    inner = {"eviction": LFU}
