"""All that this plugin needs to test: it keeps the contract it declares."""

from dovetail_drafter_copycat import PROVIDER
from dovetail_testing.drafter import DrafterContract


class TestCopycat(DrafterContract):
    provider = PROVIDER
