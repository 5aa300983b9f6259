"""For plugin authors: fakes for every seam, and the contract classes of the conformance kit.

A contract class is subclassed by a plugin's own test, in ten to twenty lines:

    from dovetail.testing.attention import AttentionContract

    class TestMyAttention(AttentionContract):
        provider = PROVIDER

The contract modules need pytest, and import the provider's tensor library only while a test runs.
"""
