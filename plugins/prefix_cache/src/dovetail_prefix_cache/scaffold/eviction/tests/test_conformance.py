"""Test the contract of eviction policies: every block is returned once, alone and in random
engines."""

from dovetail_prefix_cache.testing import EvictionContract
from my_plugin import PROVIDER


class TestMyPlugin(EvictionContract):
    provider = PROVIDER
