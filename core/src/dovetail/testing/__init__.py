"""The conformance kit: for each socket a contract class, which a plugin's test subclasses in ten to twenty lines.

    from dovetail.testing.attention import AttentionContract

    class TestMyAttention(AttentionContract):
        provider = PROVIDER

A module here needs pytest, and imports the provider's tensor library only while a test runs.
"""
