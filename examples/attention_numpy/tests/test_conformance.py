"""All that this plugin needs to test: it keeps the contract it declares."""

from dovetail_attention_numpy import PROVIDER
from dovetail_testing.attention import AttentionContract


class TestNumpy(AttentionContract):
    provider = PROVIDER
    version = "0.1"
