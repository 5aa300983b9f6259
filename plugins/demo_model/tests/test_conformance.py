"""The demo model keeps the contract of models."""

from dovetail.testing.model import ModelContract
from dovetail_demo_model import dovetail_models

MODEL, DRAFT = dovetail_models()


class TestDemoModel(ModelContract):
    provider = MODEL


class TestDraftModel(ModelContract):
    provider = DRAFT
