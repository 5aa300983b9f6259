"""The drafter keeps its contract: what it leaves to the worker, a simulated one drafts."""

from dovetail_spec_draft import dovetail_drafters
from dovetail_testing.drafter import DrafterContract

(PROVIDER,) = dovetail_drafters()


class TestDraftModel(DrafterContract):
    provider = PROVIDER
