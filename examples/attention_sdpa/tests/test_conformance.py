"""All that this plugin needs to test: it keeps the contract it declares."""

from dovetail_attention_sdpa import PROVIDER
from dovetail_testing.attention import AttentionContract


class TestSdpa(AttentionContract):
    provider = PROVIDER
    version = "0.1"
