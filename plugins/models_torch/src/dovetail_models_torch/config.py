"""How the architectures of the Llama family differ, and the numbers of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.facts import window_of_layers
from dovetail_models_torch.operations import ACTIVATIONS
from dovetail_models_torch.rope import inverse_frequencies, rope_parameters


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
