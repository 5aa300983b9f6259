"""All the test that a backend needs: the contract, tried over everything that the provider
declares."""

from dovetail_testing.attention import AttentionContract
from my_plugin import PROVIDER


class TestMyPlugin(AttentionContract):
    provider = PROVIDER
    # device = "cuda:0"  # a class for each device that it declares
    # expected_failures = {"test_long_context_of_few_rows": "why it does not pass yet"}
