"""Run the conformance test of a KV-cache manager: state machines that compare it with a simple
model."""

from dovetail_testing.kv_cache import KVCacheContract
from my_plugin import PROVIDER


class TestMyPlugin(KVCacheContract):
    provider = PROVIDER
