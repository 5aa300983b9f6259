"""All that this plugin needs to test: it keeps the contract it declares."""

from dovetail.testing.drafter import DrafterContract
from dovetail_drafter_copycat import PROVIDER


class TestCopycat(DrafterContract):
    provider = PROVIDER
