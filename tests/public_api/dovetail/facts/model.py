from __future__ import annotations
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from dovetail.errors import CheckpointError

@dataclass(frozen=True)
class LayerKind:
    kind: str
    window: int | None

@dataclass(frozen=True)
class ModelFacts:
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
    layer_kinds: tuple[LayerKind, ...]
    logit_soft_cap: float | None
    eos_token_ids: tuple[int, ...]
    has_sinks: bool
    quantization_config: dict[str, Any] | None = None

    @property
    def is_windowed(self) -> bool:
        ...

    @property
    def quantization_method(self) -> str:
        ...

    @property
    def quantization_said(self) -> str:
        ...

def model_facts(folder: Path) -> ModelFacts:
    ...

def window_of_layers(config: dict[str, Any]) -> list[int | None]:
    ...

def read_json(path: Path) -> dict[str, Any]:
    ...
