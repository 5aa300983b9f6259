"""The plugin's only test: it fulfils the contract, with the capabilities that it declares."""

from dovetail_attention_numpy import PROVIDER
from dovetail_testing.attention import AttentionContract


class TestNumpy(AttentionContract):
    provider = PROVIDER
    version = "0.1"
