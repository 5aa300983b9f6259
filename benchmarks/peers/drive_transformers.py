"""transformers, with sdpa attention; a batch is one `generate`: see protocol.py."""

from __future__ import annotations

import torch
import transformers
from protocol import main


class Transformers:
    version = transformers.__version__

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._model = loaded.eval()
        self._model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
            eos_token_id=None,
        )
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return tokens


if __name__ == "__main__":
    main(Transformers)
