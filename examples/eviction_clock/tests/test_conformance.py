"""All that this plugin needs to test: it keeps the contract it declares."""

from dovetail_eviction_clock import PROVIDER
from dovetail_prefix_cache.testing import EvictionContract


class TestClock(EvictionContract):
    provider = PROVIDER
