"""All the test that a KV-cache manager needs: the contract, as state machines against a simple
model of it."""

from dovetail_testing.kv_cache import KVCacheContract
from my_plugin import PROVIDER


class TestMyPlugin(KVCacheContract):
    provider = PROVIDER
