"""For plugin authors: fakes for every seam, and the contract classes of the conformance kit (extra
`testing`).

A contract class is subclassed by a plugin's own test, in ten to twenty lines:

    from dovetail_testing.attention import AttentionContract

    class TestMyAttention(AttentionContract):
        provider = PROVIDER

`contracts.py` says which class belongs to an extension point; `dovetail conform` runs them without
a test file. The contract modules need pytest and hypothesis, and import the provider's tensor
library only while a test runs.
"""
