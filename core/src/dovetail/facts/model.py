"""Read what the selection of providers needs from a model's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.errors import CheckpointError


@dataclass(frozen=True)
class LayerKind:
    """Requirements of one kind of layer on attention."""

    kind: str
    window: int | None


@dataclass(frozen=True)
class ModelFacts:
    """The facts from a model's config.json that the selection of providers needs."""

    folder: Path
    architecture: str
    model_type: str
    dtype: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_position_embeddings: int
    """Maximum context length, position scaling included."""
    layer_kinds: tuple[LayerKind, ...]
    logit_soft_cap: float | None
    eos_token_ids: tuple[int, ...]
    has_sinks: bool
    quantization_config: dict[str, Any] | None = None
    """The quantization config of the checkpoint, if it is quantized."""

    @property
    def is_windowed(self) -> bool:
        """True if some layers have a sliding window."""
        return any(layer.window is not None for layer in self.layer_kinds)

    @property
    def quantization_method(self) -> str:
        """`quant_method` of the checkpoint; "none" if it is not quantized."""
        return (
            "none"
            if self.quantization_config is None
            else str(self.quantization_config["quant_method"])
        )

    @property
    def quantization_said(self) -> str:
        """The checkpoint's quantization_config in one line, for errors, without empty values and
        metadata about its author."""
        settings = {
            k: v
            for k, v in (self.quantization_config or {}).items()
            if v not in (None, {}, []) and k != "meta"
        }
        text = json.dumps(settings)
        return f"quantization_config {text if len(text) < 400 else text[:400] + '…'} of config.json"


def model_facts(folder: Path) -> ModelFacts:
    """Read a model folder's config. Raises `CheckpointError`, naming the file and the key."""
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)
    path = folder / "config.json"

    if not isinstance(text, dict):
        raise CheckpointError(f"{path}: text_config must be an object, found {type(text).__name__}")

    def number(key: str, default: int | None = None) -> int:
        value = text.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{path}: {key} must be a positive integer, found {value!r}")
        most = MAX_LAYERS if "layer" in key else MAX_SIZE
        if value > most:
            raise CheckpointError(f"{path}: {key} is above {most}")
        return value

    def first(*keys: str) -> int:
        return number(next((k for k in keys if text.get(k) is not None), keys[0]))

    architectures = config.get("architectures") or [""]
    hidden, heads = (
        first("hidden_size", "n_embd", "d_model"),
        first("num_attention_heads", "n_head", "num_heads"),
    )
    dtype = str(
        text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "float32"
    ).removeprefix("torch.")
    return ModelFacts(
        folder=folder,
        architecture=str(architectures[0]),
        model_type=str(config.get("model_type", "")),
        dtype=dtype,
        num_layers=first("num_hidden_layers", "n_layer", "num_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=number(
            "num_key_value_heads", number("num_kv_heads", 1 if text.get("multi_query") else heads)
        ),
        head_size=number("head_dim", max(1, hidden // heads)),
        vocab_size=number("vocab_size"),
        max_position_embeddings=_context_length(
            text, number("max_position_embeddings", number("n_positions", 2048))
        ),
        layer_kinds=_layer_kinds(text),
        logit_soft_cap=text.get("attn_logit_softcapping"),
        eos_token_ids=_eos(folder, text),
        has_sinks=str(config.get("model_type")) == "gpt_oss",
        quantization_config=_quantization(
            path, config.get("quantization_config", text.get("quantization_config"))
        ),
    )


MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1
"""Limits far beyond any model: a config with more is broken or tries to exhaust the memory."""
_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}
"""Value of `sliding_window_pattern` by model type, if a config omits it."""
_WITHOUT_WINDOWS = frozenset({"llama"})
"""Model types without sliding windows, whatever their config contains."""
_USUAL_WINDOWS = {"mistral": 4096}
"""Value of `sliding_window` by model type, if a config omits it (null means no window)."""
_QWEN_FULL_LAYERS = 28
"""Value of Qwen's `max_window_layers`, if a config omits it."""


def window_of_layers(config: dict[str, Any]) -> list[int | None]:
    """Return the sliding window of each layer, or None. `config` is the text part of a
    config.json."""
    num_layers = (
        config.get("num_hidden_layers") or config.get("n_layer") or config.get("num_layers") or 1
    )
    kind = str(config.get("model_type"))
    window = config.get("sliding_window", _USUAL_WINDOWS.get(kind))
    types = config.get("layer_types")
    # Qwen uses windows only if enabled, and then from layer `max_window_layers` on.
    is_qwen = kind.startswith("qwen")
    is_off = kind not in _USUAL_WINDOWS and config.get("use_sliding_window", not is_qwen) is False
    if not isinstance(window, int) or kind in _WITHOUT_WINDOWS or is_off:
        return [None] * num_layers
    if isinstance(types, list):
        return [window if t == "sliding_attention" else None for t in types]
    if is_qwen:
        full = config.get("max_window_layers", _QWEN_FULL_LAYERS)
        return [None if i < full else window for i in range(num_layers)]
    pattern = config.get("sliding_window_pattern", _PATTERNS.get(kind))
    # Configs from before layer_types: every `pattern`-th layer has full attention.
    if isinstance(pattern, int) and pattern > 0:
        return [None if (i + 1) % pattern == 0 else window for i in range(num_layers)]
    return [window] * num_layers


def _context_length(config: dict[str, Any], longest: int) -> int:
    """Return the context length: `max_position_embeddings`, or the length to which YaRN extends the
    original context. Configs that follow YaRN's documentation add `rope_scaling` and leave
    `max_position_embeddings` unchanged."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) != "yarn":
        return longest
    original, factor = rope.get("original_max_position_embeddings") or longest, rope.get("factor")
    return max(longest, int(original * factor)) if isinstance(factor, int | float) else longest


def _layer_kinds(config: dict[str, Any]) -> tuple[LayerKind, ...]:
    windows = dict.fromkeys(window_of_layers(config))
    return tuple(LayerKind("full" if w is None else "sliding", w) for w in windows)


def _quantization(path: Path, config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    if not isinstance(config, dict) or not isinstance(config.get("quant_method"), str):
        raise CheckpointError(
            f"{path}: quantization_config must have a quant_method, found {config!r:.200}"
        )
    return config


def _eos(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    value = read_json(generation).get("eos_token_id") if generation.is_file() else None
    value = config.get("eos_token_id") if value is None else value
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CheckpointError`, which names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: a model folder has config.json, *.safetensors and a tokenizer"
        ) from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(data).__name__}")
    return data
