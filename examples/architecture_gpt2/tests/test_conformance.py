"""The plugin's only test: it fulfils the contract, and its logits equal those of GPT-2 in
transformers."""

import torch
import transformers

from dovetail_architecture_gpt2 import PROVIDER
from dovetail_testing.architecture import ArchitectureContract


class TestGPT2(ArchitectureContract):
    provider = PROVIDER

    @staticmethod
    def reference_logits(config, tensors, token_ids):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
        model.load_state_dict({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0]
