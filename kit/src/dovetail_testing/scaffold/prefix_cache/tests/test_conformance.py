"""Run the conformance test of a prefix cache: state machines, and engines with little memory."""

from dovetail_testing.prefix_cache import PrefixCacheContract
from my_plugin import PROVIDER


class TestMyPlugin(PrefixCacheContract):
    provider = PROVIDER
