"""Provide fakes of every interface and the contract classes of the conformance kit, for plugin
authors.

A plugin's own test is a subclass of a contract class, in ten to twenty lines:

    from dovetail_testing.attention import AttentionContract

    class TestMyAttention(AttentionContract):
        provider = PROVIDER

`contracts.py` lists the contract class of each extension point; `dovetail conform` runs them
without a test file. The contract modules need pytest and hypothesis, and import the provider's
tensor library only while a test runs.
"""
