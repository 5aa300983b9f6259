"""All the test that a drafter needs: it never changes what is said, whatever becomes of its
proposals."""

from dovetail_testing.drafter import DrafterContract
from my_plugin import PROVIDER


class TestMyPlugin(DrafterContract):
    provider = PROVIDER
