"""Run the conformance test of an attention backend, for everything that the provider declares."""

from dovetail_testing.attention import AttentionContract
from my_plugin import PROVIDER


class TestMyPlugin(AttentionContract):
    provider = PROVIDER
    # device = "cuda:0"  # use one class per declared device
    # expected_failures = {"test_long_context_of_few_rows": "why it does not pass yet"}
