"""Implement GPT-2: learned position embeddings, pre-norm layers of attention and MLP, and an output
projection that is tied to the embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.interfaces.architecture import Attend, Linear, ModelBuild, Target
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import Part


class GPT2Architecture:
    """The provider's object, which builds the model for the worker."""

    def model(self, build: ModelBuild) -> GPT2:
        return GPT2(build)


class Norm:
    """LayerNorm with weight and bias."""

    def __init__(self, build: ModelBuild, name: str, size: int) -> None:
        self.name, self.eps = name, float(build.config.get("layer_norm_epsilon", 1e-5))
        self.weight, self.bias = (
            torch.empty(size, dtype=build.dtype, device=build.device) for _ in range(2)
        )

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def targets(self) -> dict[str, Target]:
        return {
            f"{self.name}.weight": Target.into(self.weight),
            f"{self.name}.bias": Target.into(self.bias),
        }


class Layer:
    """One decoder layer: attention and MLP, each with a residual connection."""

    def __init__(
        self, build: ModelBuild, name: str, index: int, size: int, inner: int, num_heads: int
    ) -> None:
        def linear(part: str, in_features: int, out_features: int) -> Linear:
            full = f"{name}.{part}"
            return build.layers.linear(full, [Part(full, out_features)], in_features, True)

        self.index, self.shape = index, (num_heads, size // num_heads)
        self.norm_1, self.norm_2 = (
            Norm(build, f"{name}.ln_1", size),
            Norm(build, f"{name}.ln_2", size),
        )
        self.qkv, self.attention_out = (
            linear("attn.c_attn", size, 3 * size),
            linear("attn.c_proj", size, size),
        )
        self.up, self.down = linear("mlp.c_fc", size, inner), linear("mlp.c_proj", inner, size)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map `x [T, n_embd]` to the same shape."""
        q, k, v = (
            part.unflatten(1, self.shape).contiguous()
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=1)
        )
        x = x + self.attention_out(attend(self.index, q, k, v).flatten(1))
        x = x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))
        return x

    def targets(self) -> dict[str, Target]:
        found = self.norm_1.targets() | self.norm_2.targets()
        for layer in (self.qkv, self.attention_out, self.up, self.down):
            # GPT-2 stores its matrices as [in, out].
            found |= {
                name: t.transposed() if name.endswith(".weight") else t
                for name, t in layer.targets().items()
            }
        return found


class GPT2:
    """The model. Tensor names begin with "transformer.", except in the oldest checkpoints."""

    def __init__(self, build: ModelBuild) -> None:
        config, path = build.config, build.folder / "config.json"

        def number(key: str, default: int | None = None) -> int:
            value = config.get(key) or default
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{path}: {key} must be a positive integer, found {value!r}")
            return value

        size, num_heads, num_layers = number("n_embd"), number("n_head"), number("n_layer")
        if size % num_heads:
            raise CheckpointError(f"{path}: n_embd {size} is not a multiple of n_head {num_heads}")
        for key, only in (
            ("activation_function", "gelu_new"),
            ("tie_word_embeddings", True),
            ("scale_attn_weights", True),
        ):
            if config.get(key, only) != only:
                raise CheckpointError(
                    f"{path}: {key} {config[key]!r} is not supported, only {only!r}"
                )
        old = build.tensor_names and not any(
            name.startswith("transformer.") for name in build.tensor_names
        )
        prefix = "" if old else "transformer."
        self.vocab_size = number("vocab_size")
        self.embedding = build.layers.embedding(f"{prefix}wte", self.vocab_size, size)
        self.positions = torch.empty(
            number("n_positions", 1024), size, dtype=build.dtype, device=build.device
        )
        inner = number("n_inner", 4 * size)
        self.layers = [
            Layer(build, f"{prefix}h.{i}", i, size, inner, num_heads) for i in range(num_layers)
        ]
        self.norm = Norm(build, f"{prefix}ln_f", size)
        self.prefix = prefix
        by_layer = bool(config.get("scale_attn_by_inverse_layer_idx"))
        scales = [
            (size // num_heads) ** -0.5 / (i + 1 if by_layer else 1) for i in range(num_layers)
        ]
        self.attention_layers = [
            build.layers.attention(
                f"{prefix}h.{i}.attn",
                AttentionLayer(i, num_heads, num_heads, size // num_heads, scale),
            )
            for i, scale in enumerate(scales)
        ]

    def targets(self) -> dict[str, Target]:
        found = (
            self.embedding.targets()
            | self.norm.targets()
            | {f"{self.prefix}wpe.weight": Target.into(self.positions)}
        )
        for layer in self.layers:
            found |= layer.targets()
        return found

    def unused(self) -> list[str]:
        return [
            "lm_head.weight",
            "*.attn.bias",
            "*.attn.masked_bias",
        ]  # the tied output projection, and causal masks in old checkpoints

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.embedding.rows(token_ids) + self.positions[positions]
        for layer in self.layers:
            x = layer.forward(x, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.embedding(hidden, torch.float32)
        return logits
