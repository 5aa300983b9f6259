from __future__ import annotations
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import Part
from dovetail.interfaces.worker import Progress
CONTRACT = '0.1'
Array = Any

@dataclass(frozen=True)
class ArchitectureCapabilities:
    architectures: tuple[str, ...] | None
    framework: str = 'torch'
    quantization: bool = True
    loads_weights: bool = False
    examples: tuple[dict[str, Any], ...] = ()
    compiled: Literal['operations', 'torch.compile'] | None = None
    fused: bool = False

class Target(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any
    store: Callable[[Array], object]
    asked_by: str = "the model's config"

    @staticmethod
    def into(tensor: Array, shape: tuple[int, ...] | None=None) -> Target:
        ...

    def and_into(self, other: Target) -> Target:
        ...

    def transposed(self) -> Target:
        ...

class Linear(Protocol):

    def targets(self) -> dict[str, Target]:
        ...

class Embedding(Linear, Protocol):

    def rows(self, token_ids: Array) -> Array:
        ...

class LayerMaker(Protocol):

    def linear(self, name: str, parts: Sequence[Part], in_features: int, bias: bool) -> Linear:
        ...

    def embedding(self, name: str, vocab_size: int, size: int) -> Embedding:
        ...

    def tied(self, name: str, embedding: Embedding, of: str, vocab_size: int, size: int) -> Linear:
        ...

    def attention(self, name: str, layer: AttentionLayer) -> AttentionLayer:
        ...

class WeightFiles(Protocol):

    def check(self) -> int:
        ...

    def are_equal(self, name: str, other: str) -> bool:
        ...

@dataclass(frozen=True)
class ModelBuild:
    folder: Path
    config: Mapping[str, Any]
    tensor_names: frozenset[str]
    layers: LayerMaker
    dtype: Any
    device: Any
    progress: Progress
    files: WeightFiles | None = None
    compiled: bool = False
    fused: bool = False

class Attend(Protocol):
    ...

class Model(Protocol):
    attention_layers: list[AttentionLayer]
    vocab_size: int

    def targets(self) -> dict[str, Target]:
        ...

    def unused(self) -> Collection[str]:
        ...

    def forward(self, token_ids: Array, positions: Array, attend: Attend) -> Array:
        ...

    def logits(self, hidden: Array) -> Array:
        ...

class Architecture(Protocol):

    def model(self, build: ModelBuild) -> Model:
        ...
