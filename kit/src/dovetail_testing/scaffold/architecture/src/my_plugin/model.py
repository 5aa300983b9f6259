"""Implement Llama, as a starting point for another model. A model reads no file and knows no cache:
`build.layers` supplies the linear layers (quantized or packed if configured), `attend` computes
attention, and `targets` says where each tensor goes.

Symbols: T tokens of the step, laid end to end whatever their sequence; H hidden size; D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.interfaces.architecture import Attend, Linear, ModelBuild, Target
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import Part


class MyPluginArchitecture:
    """An `Architecture`, which builds a model for the worker."""

    def model(self, build: ModelBuild) -> Llama:
        return Llama(build)


class Norm:
    """A norm that divides rows by their root mean square, in float32."""

    def __init__(self, build: ModelBuild, name: str, size: int) -> None:
        self.name, self.eps = name, float(build.config.get("rms_norm_eps", 1e-6))
        self.weight = torch.empty(size, dtype=build.dtype, device=build.device)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (
            wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        ).to(x.dtype)

    def targets(self) -> dict[str, Target]:
        return {f"{self.name}.weight": Target.into(self.weight)}


class Layer:
    """Attention and MLP, each with a residual connection."""

    def __init__(
        self, build: ModelBuild, index: int, size: int, inner: int, heads: tuple[int, int, int]
    ) -> None:
        name, (num_heads, num_kv_heads, head_size) = f"model.layers.{index}", heads
        sizes = {
            "q": num_heads * head_size,
            "k": num_kv_heads * head_size,
            "v": num_kv_heads * head_size,
        }

        def linear(fused: str, in_features: int, parts: dict[str, int]) -> Linear:
            """Build one fused layer from the checkpoint's layers `parts`, whose outputs are
            concatenated."""
            fused_parts = [
                Part(f"{name}.{part}", out_features) for part, out_features in parts.items()
            ]
            return build.layers.linear(f"{name}.{fused}", fused_parts, in_features, False)

        self.index, self.heads = index, heads
        self.qkv = linear(
            "self_attn.qkv_proj", size, {f"self_attn.{x}_proj": n for x, n in sizes.items()}
        )
        self.attention_out = linear("self_attn.o_proj", sizes["q"], {"self_attn.o_proj": size})
        self.gate_up = linear(
            "mlp.gate_up_proj", size, {"mlp.gate_proj": inner, "mlp.up_proj": inner}
        )
        self.down = linear("mlp.down_proj", inner, {"mlp.down_proj": size})
        self.norm_1 = Norm(build, f"{name}.input_layernorm", size)
        self.norm_2 = Norm(build, f"{name}.post_attention_layernorm", size)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Compute `x [T, H]` → `[T, H]`."""
        num_heads, num_kv_heads, head_size = self.heads
        q, k, v = (
            self.qkv(self.norm_1(x))
            .unflatten(1, (-1, head_size))
            .split((num_heads, num_kv_heads, num_kv_heads), 1)
        )
        seen = attend(self.index, rotate(q, *angles), rotate(k, *angles), v.contiguous())
        x = x + self.attention_out(seen.flatten(1))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, 1)
        x = x + self.down(F.silu(gate) * up)
        return x

    def targets(self) -> dict[str, Target]:
        parts = (self.norm_1, self.norm_2, self.qkv, self.attention_out, self.gate_up, self.down)
        return {name: target for part in parts for name, target in part.targets().items()}


class Llama:
    """A `Model`. Anything that a config.json requires and this code does not support is an error
    that names it."""

    def __init__(self, build: ModelBuild) -> None:
        config: Any = build.config
        size, num_heads = config["hidden_size"], config["num_attention_heads"]
        head_size = config.get("head_dim") or size // num_heads
        heads = (num_heads, config.get("num_key_value_heads") or num_heads, head_size)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
        settings = {
            "hidden_act": config.get("hidden_act"),
            "rope_type": rope.get("rope_type"),
            "attention_bias": config.get("attention_bias"),
            "mlp_bias": config.get("mlp_bias"),
        }
        if unknown := {
            key: value
            for key, value in settings.items()
            if value not in (None, False, "silu", "default")
        }:
            path = build.folder / "config.json"
            raise CheckpointError(f"{path}: my-plugin does not support {unknown}")
        self.frequencies = theta ** -(
            torch.arange(0, head_size, 2, device=build.device) / head_size
        )
        self.vocab_size: int = config["vocab_size"]
        self.embedding = build.layers.embedding("model.embed_tokens", self.vocab_size, size)
        self.head: Linear = self.embedding  # tied: one table for both ends
        if not config.get("tie_word_embeddings"):
            self.head = build.layers.linear(
                "lm_head", [Part("lm_head", self.vocab_size)], size, False
            )
        self.layers = [
            Layer(build, i, size, config["intermediate_size"], heads)
            for i in range(config["num_hidden_layers"])
        ]
        self.norm = Norm(build, "model.norm", size)
        self.attention_layers = [
            build.layers.attention(
                f"model.layers.{i}.self_attn", AttentionLayer(i, *heads, scale=head_size**-0.5)
            )
            for i in range(len(self.layers))
        ]

    def targets(self) -> dict[str, Target]:
        """Return every tensor that the checkpoint must contain, and its destination."""
        found = self.embedding.targets() | self.head.targets() | self.norm.targets()
        for layer in self.layers:
            found |= layer.targets()
        return found

    def unused(self) -> list[str]:
        # A checkpoint may contain a tied head although it is not needed.
        return ["lm_head.weight"] if self.head is self.embedding else []

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Compute `i64[T]`, `i64[T]` → hidden states `[T, H]`."""
        turns = positions[:, None] * self.frequencies
        angles = turns.cos()[:, None], turns.sin()[:, None]  # [T, 1, D / 2]
        x = self.embedding.rows(token_ids)
        for layer in self.layers:
            x = layer.forward(x, angles, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute `[R, H]` → `f32[R, V]`."""
        logits: Tensor = self.head(hidden, torch.float32)
        return logits


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions: element i of a head is rotated with element i + D / 2. `x [T, heads,
    D]`."""
    one, two = x.float().chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1).to(x.dtype)
