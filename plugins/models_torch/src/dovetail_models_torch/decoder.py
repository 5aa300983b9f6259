"""One decoder for the Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3 differ in the switches
below, not in code.

Per layer: norm, fused qkv, (per-head norm,) rotation of q and k in one go, attention, output
projection; norm, fused gate and up, SiLU, down projection. Residuals are added in place, together
with the norm that follows (operations.py). Plain objects rather than `nn.Module`s: at one token a
step the interpreter is a good part of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from dovetail.facts import device_facts
from dovetail.interfaces.architecture import Attend, LayerMaker, ModelBuild, Target
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.compiled import CompiledAttention, CompiledEmbedding, CompiledForward
from dovetail.interfaces.quantization import Part
from dovetail_models_torch.compiled import CompiledDecoder
from dovetail_models_torch.config import DecoderConfig, read_config
from dovetail_models_torch.layer import DecoderLayer
from dovetail_models_torch.native import OperationLibrary
from dovetail_models_torch.operations import Operations, TorchOperations
from dovetail_models_torch.rope import RotaryEmbedding

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class DecoderArchitecture:
    """An `Architecture`: makes a `Decoder`."""

    def model(self, build: ModelBuild) -> Decoder:
        sizes = read_config(build.folder / "config.json", build.config)
        if (
            sizes.tied
            and HEAD in build.tensor_names
            and not (build.files and build.files.are_equal(HEAD, EMBEDDING))
        ):
            # As in transformers: what a checkpoint holds goes before what its config says of
            # sharing.
            sizes = replace(sizes, tied=False)
        operations: Operations = TorchOperations()
        if build.fused:
            from dovetail_models_torch.fused import TritonOperations  # Triton is not always there

            operations = TritonOperations()
        return Decoder(sizes, build.layers, build.dtype, build.device, operations)


class Decoder:
    """Embedding, layers, final norm, output projection. A `Model`."""

    def __init__(
        self,
        c: DecoderConfig,
        maker: LayerMaker,
        dtype: torch.dtype,
        device: torch.device,
        operations: Operations,
    ) -> None:
        self.config, self.operations = c, operations
        self.vocab_size = c.vocab_size
        self.attention_layers = [
            maker.attention(
                f"model.layers.{i}.self_attn",
                AttentionLayer(
                    i, c.num_heads, c.num_kv_heads, c.head_size, c.head_size**-0.5, window=window
                ),
            )
            for i, window in enumerate(c.windows)
        ]
        self.rotary = RotaryEmbedding(c.inv_freq, c.rope_scale, dtype, device)
        self.embedding = maker.embedding("model.embed_tokens", c.vocab_size, c.hidden_size)
        self.layers = [
            DecoderLayer(f"model.layers.{i}", i, c, maker, dtype, device)
            for i in range(c.num_layers)
        ]
        self.norm = torch.empty(c.hidden_size, dtype=dtype, device=device)
        if c.tied:
            self.lm_head = maker.tied(
                "lm_head", self.embedding, "model.embed_tokens", c.vocab_size, c.hidden_size
            )
        else:
            self.lm_head = maker.linear(
                "lm_head", [Part("lm_head", c.vocab_size)], c.hidden_size, False
            )

    def targets(self) -> dict[str, Target]:
        """Every tensor that the checkpoint must hold, by name."""
        found = {"model.norm.weight": Target.into(self.norm)} | self.embedding.targets()
        for layer in self.layers:
            found |= layer.targets()
        head = {} if self.lm_head is self.embedding else self.lm_head.targets()
        for name, target in head.items():
            found[name] = found[name].and_into(target) if name in found else target
        return found

    def unused(self) -> list[str]:
        return [HEAD] if self.config.tied else []

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        hidden, ops = self.embedding.rows(token_ids), self.operations
        cos, sin = self.rotary(positions)
        x = ops.rms_norm(hidden, self.layers[0].input_norm, self.config.norm_eps)
        for layer, next_norm in zip(
            self.layers, [*(layer.input_norm for layer in self.layers[1:]), self.norm], strict=True
        ):
            x = layer.forward(hidden, x, cos, sin, attend, ops, next_norm)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden, torch.float32)
        return logits

    def compile_forward(
        self, max_num_tokens: int, backends: Sequence[CompiledAttention], caches: Sequence[Any]
    ) -> CompiledForward:
        compiled = CompiledDecoder(
            OperationLibrary.load(device_facts()),
            self.config,
            cast(CompiledEmbedding, self.embedding),
            self.layers,
            self.attention_layers,
            self.norm,
            max_num_tokens,
        )
        return compiled.forward(backends, caches)
