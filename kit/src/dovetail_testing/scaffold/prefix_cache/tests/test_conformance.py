"""All the test that a prefix cache needs: the contract, as state machines and in engines with
little memory."""

from dovetail_testing.prefix_cache import PrefixCacheContract
from my_plugin import PROVIDER


class TestMyPlugin(PrefixCacheContract):
    provider = PROVIDER
