"""Run the conformance test of a model's files: config, weights, tokenizer and licence."""

from dovetail_testing.model import ModelContract
from my_plugin import PROVIDER


class TestMyPlugin(ModelContract):
    provider = PROVIDER
