"""All that this plugin needs to test: it keeps the contract it declares, and computes what transformers' GPT-2 computes."""

import torch
import transformers

from dovetail.testing.architecture import ArchitectureContract
from dovetail_architecture_gpt2 import PROVIDER

TINY = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 203, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}


class TestGPT2(ArchitectureContract):
    provider = PROVIDER
    configs = (TINY, {**TINY, "n_inner": 80, "scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3})

    @staticmethod
    def reference_logits(config, tensors, token_ids):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
        model.load_state_dict({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0]
