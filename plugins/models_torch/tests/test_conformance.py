"""Our own decoder keeps the contract that a third party's model code keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dovetail_models_torch import DECODER
from dovetail_testing.architecture import ArchitectureContract


class TestDecoder(ArchitectureContract):
    provider = DECODER

    @staticmethod
    def reference_logits(
        config: dict[str, Any], tensors: dict[str, Tensor], token_ids: list[int]
    ) -> Tensor:
        import transformers

        name = config["architectures"][0].removesuffix("ForCausalLM")
        settings = getattr(transformers, f"{name}Config")(**config)
        model = getattr(transformers, f"{name}ForCausalLM")(settings).eval()
        tied = (
            {"lm_head.weight": tensors["model.embed_tokens.weight"]}
            if config.get("tie_word_embeddings")
            else {}
        )
        model.load_state_dict({**tensors, **tied})
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0]
