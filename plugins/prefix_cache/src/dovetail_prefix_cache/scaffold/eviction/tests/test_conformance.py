"""All the test that a policy needs: every block leaves once, alone and in engines that come and
go."""

from dovetail_prefix_cache.testing import EvictionContract
from my_plugin import PROVIDER


class TestMyPlugin(EvictionContract):
    provider = PROVIDER
