"""Run the conformance test of model code: loading, attention, and equal results for a prompt in
pieces and whole."""

from dovetail_testing.architecture import ArchitectureContract
from my_plugin import PROVIDER


class TestMyPlugin(ArchitectureContract):
    provider = PROVIDER

    # A good test compares with other code: (config, the checkpoint's tensors, token ids) → logits
    # f32[T, V]. @staticmethod def reference_logits(config, tensors, token_ids): ...
