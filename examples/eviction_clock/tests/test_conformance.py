"""The plugin's only test: it fulfils the contract, with the capabilities that it declares."""

from dovetail_eviction_clock import PROVIDER
from dovetail_prefix_cache.testing import EvictionContract


class TestClock(EvictionContract):
    provider = PROVIDER
