"""Run the conformance test of a drafter: it never changes outputs, whatever happens to its
proposals."""

from dovetail_testing.drafter import DrafterContract
from my_plugin import PROVIDER


class TestMyPlugin(DrafterContract):
    provider = PROVIDER
