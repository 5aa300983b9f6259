"""Tiny quantized checkpoints, packed by the tests' own packers, each with a reference that
multiplies by plain weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail import LLM, SamplingParams

SIZES: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
PROMPTS = [
    [5, 80, 33],
    [7],
    [100, 4, 61, 9, 150, 12, 13, 199, 2, 8, 8, 30],
    [90, 91, 92, 93],
    [44, 202, 1, 1, 17, 66],
]
TOP = 20

Config = dict[str, Any]
Make = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""A plain weight [out, in] → its tensors in the checkpoint, and the weight that they stand for."""
Rounding = Callable[[Tensor], Tensor]
"""Of a layer's inputs."""


@dataclass
class Quantized:
    """A checkpoint, and the model that it stands for: with plain weights, and hooks that round
    inputs."""

    folder: Path
    model: Any
    tensors: dict[str, Tensor]
    config: Config = field(repr=False)

    def save(self) -> None:
        """Again, after a change."""
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, self.folder / "model.safetensors")

    @torch.inference_mode()
    def logits(self, prompt: list[int]) -> Tensor:
        """Of the next token."""
        found: Tensor = self.model(torch.tensor([prompt])).logits[0, -1]
        return found


def quantize(
    folder: Path,
    quantization_config: Config,
    rules: Sequence[tuple[str, Make | None]],
    rounding: Rounding | None = None,
) -> Quantized:
    """Make a Llama of random weights whose linear layers are stored as the first rule says whose
    glob matches their name."""
    import transformers

    seed = random.randrange(2**31)
    print(f"weights from seed {seed}")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.LlamaForCausalLM(config).eval()
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        # Spread the logits, which are nearly equal when freshly made, and give parts of a fused
        # layer scales of their own.
        size = {"q_proj": 2.0, "k_proj": 5.0, "v_proj": 9.0, "gate_proj": 3.0}.get(
            name.split(".")[-2], 4.0
        )
        if parameter.dim() > 1:
            parameter.data *= size
        tensors[name] = parameter.data.clone()
    for name, layer in model.named_modules():
        make = next((make for glob, make in rules if fnmatchcase(name, glob)), None)
        if isinstance(layer, nn.Linear) and make is not None:
            stored, layer.weight.data = make(layer.weight.data)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in stored.items()}
            if rounding is not None:
                layer.register_forward_pre_hook(lambda _, given: (rounding(given[0]),))
    made = Quantized(
        folder, model, tensors, {**config.to_dict(), "quantization_config": quantization_config}
    )
    made.config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    folder.mkdir(exist_ok=True)
    made.save()
    return made


def next_tokens(
    folder: Path, prompts: list[list[int]] = PROMPTS, **values: Any
) -> tuple[list[dict[int, float]], Any]:
    """The log-probabilities of the `TOP` likeliest next tokens, for each prompt, and the plan."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "kv_cache": {"use": "paged", "memory_gb": 0.01},
    }
    with LLM(folder, **{**settings, **values}) as llm:
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=TOP, ignore_eos=True)
        outputs = llm.generate(prompts, params)
    return [o.logprobs[0] for o in outputs if o.logprobs], llm.plan


def error(found: dict[int, float], expected: dict[int, float], spread: float) -> float:
    """The root mean square of how logits differ, by their standard deviation; of the tokens in
    both, but for a constant."""
    both = sorted(found.keys() & expected.keys())
    assert len(both) >= min(5, len(expected)) - 1, (
        f"the likeliest tokens are others: {found}, {expected}"
    )
    difference = torch.tensor([found[t] - expected[t] for t in both])
    return float((difference - difference.mean()).pow(2).mean().sqrt()) / spread


def errors(made: Quantized, **values: Any) -> list[float]:
    """Of an engine's next tokens, beside the reference's: for each prompt, the smallest first."""
    found, _ = next_tokens(made.folder, **values)
    all_errors = []
    for prompt, ours in zip(PROMPTS, found, strict=True):
        logits = made.logits(prompt)
        all_errors.append(error(ours, dict(enumerate(logits.tolist())), float(logits.std())))
    return sorted(all_errors)
