"""The drafter keeps its contract: what it leaves to the worker, a simulated one drafts."""

from dovetail.testing.drafter import DrafterContract
from dovetail_spec_draft import dovetail_drafters

(PROVIDER,) = dovetail_drafters()


class TestDraftModel(DrafterContract):
    provider = PROVIDER
