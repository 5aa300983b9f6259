"""One decoder for the Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3 differ in the switches
below, not in code.

Per layer: norm, fused qkv, (per-head norm,) rotation of q and k in one go, attention, output
projection; norm, fused gate and up, SiLU, down projection. Residuals are added in place, together
with the norm that follows (operations.py). Plain objects rather than `nn.Module`s: at one token a
step the interpreter is a good part of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.facts import window_of_layers
from dovetail.interfaces.architecture import Attend, LayerMaker, Linear, ModelBuild, Target
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import Part
from dovetail_worker_torch.checkpoint import are_equal
from dovetail_worker_torch.operations import ACTIVATIONS, Operations, TorchOperations
from dovetail_worker_torch.rope import RotaryEmbedding, inverse_frequencies, rope_parameters


@dataclass(frozen=True)
class Switches:
    """How an architecture differs. A switch is fixed, or the name of the config's key that says it
    (absent: False)."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    """RMS norm of each query and key head, before the rotation."""
    sliding_window: bool = False
    """Whether the config's window counts."""


ARCHITECTURES: dict[str, Switches] = {
    "LlamaForCausalLM": Switches(
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "MistralForCausalLM": Switches(sliding_window=True),
    "Qwen2ForCausalLM": Switches(qkv_bias=True, sliding_window=True),
    "Qwen3ForCausalLM": Switches(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, sliding_window=True
    ),
}

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
KINDS_OF_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers of a config.json, checked."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    norm_eps: float
    activation: str
    tied: bool
    """The output projection is the embedding."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Per layer."""
    inv_freq: Tensor
    rope_scale: float


def read_config(path: Path, config: Mapping[str, Any]) -> DecoderConfig:
    """Read `config`, the contents of the config.json at `path`. Raises `CheckpointError` naming the
    key."""
    switches = ARCHITECTURES[config["architectures"][0]]

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{path}: {key} must be a positive integer, found {value!r}")
        return value

    def switch(value: bool | str) -> bool:
        return bool(config.get(value, False)) if isinstance(value, str) else value

    hidden_size, num_heads = number("hidden_size"), number("num_attention_heads")
    num_layers, num_kv_heads = number("num_hidden_layers"), number("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{path}: {num_heads} query heads cannot share {num_kv_heads} key/value heads evenly"
        )
    # Qwen3 is the one whose head size, when absent, does not follow from the others.
    head_size = number("head_dim", 128 if switches.qk_norm else hidden_size // num_heads)
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: hidden_act {activation!r} is not supported; known are"
            f" {', '.join(ACTIVATIONS)}"
        )
    norm_eps = config.get("rms_norm_eps", 1e-6)
    if not isinstance(norm_eps, int | float) or isinstance(norm_eps, bool) or not norm_eps > 0:
        raise CheckpointError(f"{path}: rms_norm_eps must be a number above 0, found {norm_eps!r}")
    if config.get("is_causal") is False:
        raise CheckpointError(f"{path}: is_causal is false, and only causal attention is served")
    windows = _windows(path, config, num_layers) if switches.sliding_window else [None] * num_layers
    max_position_embeddings = number("max_position_embeddings", 2048)
    try:
        inv_freq, rope_scale = inverse_frequencies(
            rope_parameters(dict(config)), head_size, max_position_embeddings
        )
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from None
    return DecoderConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        vocab_size=number("vocab_size"),
        norm_eps=float(norm_eps),
        activation=activation,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=switch(switches.qkv_bias),
        o_bias=switch(switches.o_bias),
        mlp_bias=switch(switches.mlp_bias),
        qk_norm=switches.qk_norm,
        windows=tuple(windows),
        inv_freq=inv_freq,
        rope_scale=rope_scale,
    )


def _windows(path: Path, config: Mapping[str, Any], num_layers: int) -> list[int | None]:
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if window is not None and (
        not isinstance(window, int) or isinstance(window, bool) or window < 1
    ):
        raise CheckpointError(
            f"{path}: sliding_window must be a positive integer or null, found {window!r}"
        )
    if isinstance(kinds, list):
        if len(kinds) != num_layers:
            raise CheckpointError(
                f"{path}: layer_types has {len(kinds)} entries for {num_layers} layers"
            )
        if other := sorted({str(kind) for kind in kinds} - KINDS_OF_LAYERS):
            raise CheckpointError(
                f"{path}: layer_types holds {', '.join(other)}, which this architecture does not"
                " have"
            )
    windows = window_of_layers(dict(config))
    if isinstance(kinds, list) and "sliding_attention" in kinds and not any(windows):
        raise CheckpointError(
            f"{path}: layer_types has sliding layers, and sliding_window is missing or switched off"
        )
    return windows


class DecoderArchitecture:
    """An `Architecture`: makes a `Decoder`."""

    def model(self, build: ModelBuild) -> Decoder:
        sizes = read_config(build.folder / "config.json", build.config)
        if (
            sizes.tied
            and HEAD in build.tensor_names
            and not are_equal(build.folder, HEAD, EMBEDDING)
        ):
            # As in transformers: what a checkpoint holds goes before what its config says of
            # sharing.
            sizes = replace(sizes, tied=False)
        return Decoder(sizes, build.layers, build.dtype, build.device)


class DecoderLayer:
    """Attention and MLP, each around a residual. `name` is the checkpoint's ("model.layers.3")."""

    def __init__(
        self,
        name: str,
        index: int,
        c: DecoderConfig,
        maker: LayerMaker,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name, self.index = name, index
        self.num_heads, self.num_kv_heads, self.head_size, self.eps = (
            c.num_heads,
            c.num_kv_heads,
            c.head_size,
            c.norm_eps,
        )
        self.num_qk_heads = c.num_heads + c.num_kv_heads
        self.num_qkv_heads = c.num_heads + 2 * c.num_kv_heads
        self.activation = c.activation
        q_size, kv_size = c.num_heads * c.head_size, c.num_kv_heads * c.head_size

        def linear(fused: str, in_features: int, bias: bool, **parts: int) -> Linear:
            block, _, _ = fused.partition(".")
            full = [
                Part(f"{name}.{block}.{part}", out_features) for part, out_features in parts.items()
            ]
            return maker.linear(f"{name}.{fused}", full, in_features, bias)

        h, f = c.hidden_size, c.intermediate_size
        self.qkv_proj = linear(
            "self_attn.qkv_proj", h, c.qkv_bias, q_proj=q_size, k_proj=kv_size, v_proj=kv_size
        )
        self.o_proj = linear("self_attn.o_proj", q_size, c.o_bias, o_proj=h)
        self.gate_up_proj = linear("mlp.gate_up_proj", h, c.mlp_bias, gate_proj=f, up_proj=f)
        self.down_proj = linear("mlp.down_proj", f, c.mlp_bias, down_proj=h)
        self.linears = (self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj)
        self.input_norm = torch.empty(h, dtype=dtype, device=device)
        self.post_attention_norm = torch.empty(h, dtype=dtype, device=device)
        # A row a head, so that queries and keys are scaled in one multiplication.
        self.qk_norm = (
            torch.empty(self.num_qk_heads, c.head_size, dtype=dtype, device=device)
            if c.qk_norm
            else None
        )

    def targets(self) -> dict[str, Target]:
        found = {
            f"{self.name}.input_layernorm.weight": Target.into(self.input_norm),
            f"{self.name}.post_attention_layernorm.weight": Target.into(self.post_attention_norm),
        }
        if self.qk_norm is not None:
            shape = (self.head_size,)
            found[f"{self.name}.self_attn.q_norm.weight"] = Target.into(
                self.qk_norm[: self.num_heads], shape
            )
            found[f"{self.name}.self_attn.k_norm.weight"] = Target.into(
                self.qk_norm[self.num_heads :], shape
            )
        for layer in self.linears:
            found |= layer.targets()
        return found

    def forward(
        self,
        hidden: Tensor,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        ops: Operations,
        next_norm: Tensor,
    ) -> Tensor:
        """Add the layer's two contributions to `hidden: [T, H]`, in place. `x` is `hidden` under
        the layer's first norm; returns the new `hidden` under `next_norm`."""
        num_tokens = hidden.shape[0]
        qkv = self.qkv_proj(x).view(num_tokens, self.num_qkv_heads, self.head_size)
        q, k, v = ops.rotated(
            qkv, self.num_heads, self.num_kv_heads, self.qk_norm, self.eps, cos, sin
        )
        seen = attend(self.index, q, k, v)
        x = ops.add_rms_norm(
            hidden, self.o_proj(seen.view(num_tokens, -1)), self.post_attention_norm, self.eps
        )
        gated = ops.gated(self.gate_up_proj(x), self.activation)
        return ops.add_rms_norm(hidden, self.down_proj(gated), next_norm, self.eps)


class Decoder:
    """Embedding, layers, final norm, output projection. A `Model`."""

    def __init__(
        self, c: DecoderConfig, maker: LayerMaker, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = c
        self.operations: Operations = TorchOperations()
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
