"""Test the demo model against the contract of models."""

from dovetail_demo_model import dovetail_models
from dovetail_testing.model import ModelContract

MODEL, DRAFT = dovetail_models()


class TestDemoModel(ModelContract):
    provider = MODEL


class TestDraftModel(ModelContract):
    provider = DRAFT
