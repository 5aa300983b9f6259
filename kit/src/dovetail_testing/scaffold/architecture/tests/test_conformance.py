"""All the test that model code needs: loading, attention, and a prompt in pieces equal to the
whole."""

from dovetail_testing.architecture import ArchitectureContract
from my_plugin import PROVIDER


class TestMyPlugin(ArchitectureContract):
    provider = PROVIDER

    # The best test there is: (config, the checkpoint's tensors, token ids) → logits f32[T, V], by
    # somebody else's code. @staticmethod def reference_logits(config, tensors, token_ids): ...
