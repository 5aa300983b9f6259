"""The plugin's only test: it fulfils the contract, with the capabilities that it declares."""

from dovetail_drafter_copycat import PROVIDER
from dovetail_testing.drafter import DrafterContract


class TestCopycat(DrafterContract):
    provider = PROVIDER
