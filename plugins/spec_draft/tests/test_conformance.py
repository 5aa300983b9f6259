"""Test the drafter against its contract. The simulated worker drafts the tokens."""

from dovetail_spec_draft import dovetail_drafters
from dovetail_testing.drafter import DrafterContract

(PROVIDER,) = dovetail_drafters()


class TestDraftModel(DrafterContract):
    provider = PROVIDER
