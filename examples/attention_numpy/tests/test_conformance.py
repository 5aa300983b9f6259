"""All that this plugin needs to test: it keeps the contract it declares."""

from dovetail.testing.attention import AttentionContract
from dovetail_attention_numpy import PROVIDER


class TestNumpy(AttentionContract):
    provider = PROVIDER
    version = "0.1"
