"""Model code: ragged tokens in, hidden states out. The worker supplies attention, linear layers and
the checkpoint's tensors.

A step's T tokens are the rows of a ragged batch laid end to end (prefill chunks and decode tokens
alike): no batch dimension, no padding, no mask. A model knows nothing of sequences, blocks or
caches: each layer hands its queries, keys and values to `attend` and gets back what its queries
saw. It asks for its linear layers by name (`LayerMaker`), and so has those that the machine and the
quantization chosen call for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import Part
from dovetail.interfaces.worker import Progress

CONTRACT = "0.1"
Array = Any


@dataclass(frozen=True)
class ArchitectureCapabilities:
    """What a provider's models are, as data."""

    architectures: tuple[str, ...] | None
    """Names, as in `architectures` of a config.json. None is any."""
    framework: str = "torch"
    quantization: bool = True
    """The linear layers are those of the `LayerMaker`, so that a scheme can supply them."""
    loads_weights: bool = False
    """`model` returns with its weights read. Otherwise the worker reads what `targets` names."""
    examples: tuple[dict[str, Any], ...] = ()
    """Contents of config.json of tiny models, one for each architecture at least: what conformance
    is tried with."""
    compiled: Literal["operations", "torch.compile"] | None = None
    """How a worker can compile the steps of its models. "operations": they are `CompilableModel`s
    (interfaces/compiled.py). "torch.compile": `model` compiles where `ModelBuild.compiled` is set.
    None: not at all."""
    fused: bool = False
    """Its models have fused GPU kernels, in Triton: see `ModelBuild.fused`."""


class Target(NamedTuple):
    """Where a checkpoint's tensor goes."""

    shape: tuple[int, ...]
    """In the file."""
    dtype: Any
    """Of what is kept. Floating types are converted; any other must be stored as it is wanted."""
    store: Callable[[Array], object]
    """Called with the tensor as it lies in the file: a view of the mapped file, good for this call.
    Raises `CheckpointError` for values that cannot be: who reads the file says where."""
    asked_by: str = "the model's config"
    """What says that the tensor is there, in this shape: for errors."""

    @staticmethod
    def into(tensor: Array, shape: tuple[int, ...] | None = None) -> Target:
        """Copy into `tensor`, which may be a part of another. `shape` in the file, where it is
        broadcast to tensor's."""
        return Target(tuple(tensor.shape) if shape is None else shape, tensor.dtype, tensor.copy_)

    def and_into(self, other: Target) -> Target:
        """One tensor of the file for both."""

        def store(tensor: Array) -> None:
            self.store(tensor)
            other.store(tensor)

        return self._replace(store=store)

    def transposed(self) -> Target:
        """For a checkpoint that holds the matrix the other way round, `[in, out]`."""
        return self._replace(shape=self.shape[::-1], store=lambda tensor: self.store(tensor.T))


class Linear(Protocol):
    """What a linear layer does, whatever its weights look like."""

    def __call__(self, x: Array, dtype: Any = None) -> Array:
        """`x [T, in]` → `[T, out]`, a new array of `dtype`, by default x's."""

    def targets(self) -> dict[str, Target]:
        """The checkpoint's tensors that it reads, by name."""


class Embedding(Linear, Protocol):
    """A table of vectors by token id, which may also be the output projection (tied)."""

    def rows(self, token_ids: Array) -> Array:
        """`i64[T]` → `[T, in]`, a new array."""


class LayerMaker(Protocol):
    """Makes a model's layers, their weights declared and not yet read."""

    def linear(self, name: str, parts: Sequence[Part], in_features: int, bias: bool) -> Linear:
        """`name` is the layer's full name ("model.layers.3.mlp.down_proj"); the parts have the full
        names of the checkpoint's layers and lie one after the other in the output."""

    def embedding(self, name: str, vocab_size: int, size: int) -> Embedding:
        """Never quantized."""

    def tied(self, name: str, embedding: Embedding, of: str, vocab_size: int, size: int) -> Linear:
        """The output projection `name` ("lm_head") of a model whose weight for it is that of
        `embedding`, named `of`: the embedding itself, or a layer of its own, which wants the
        embedding's tensor too, where a rule says so."""

    def attention(self, name: str, layer: AttentionLayer) -> AttentionLayer:
        """The layer as it is to be, with the scales of its keys and values where the checkpoint has
        some. `name` is that of the module in the checkpoint ("model.layers.3.self_attn")."""


class WeightFiles(Protocol):
    """The weight files of a model's folder. Every method raises `CheckpointError`, naming the
    file."""

    def check(self) -> int:
        """Open every file. Return the bytes of all."""

    def are_equal(self, name: str, other: str) -> bool:
        """Return whether two tensors hold the same numbers. False if one is missing."""


@dataclass(frozen=True)
class ModelBuild:
    """What a model is made of."""

    folder: Path
    config: Mapping[str, Any]
    """The contents of config.json."""
    tensor_names: frozenset[str]
    """What the checkpoint holds."""
    layers: LayerMaker
    dtype: Any
    """Of weights and hidden states, and their device: the framework's own objects."""
    device: Any
    progress: Progress
    """For models that load their weights."""
    files: WeightFiles | None = None
    """None: the tensors do not come from files."""
    compiled: bool = False
    """For `compiled="torch.compile"`: the model's steps are to be compiled. Raises `ConfigError` if
    that is not possible here."""
    fused: bool = False
    """For `fused`: use fused GPU kernels. Triton is installed, and the device is a GPU."""


class Attend(Protocol):
    """A step's attention, for all layers."""

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """`q [T, Hq, D]`, `k, v [T, Hkv, D]` → `[T, Hq, D]`. Writes k and v to the layer's cache,
        then attends.

        All arguments are contiguous, in the model's dtype, and good for this call alone; so is the
        result, until the next call."""


class Model(Protocol):
    """A decoder-only language model. `forward` and `logits` keep no state."""

    attention_layers: list[AttentionLayer]
    """In order; `attention_layers[i].index == i`, and `attend` is called with each index once a
    forward pass."""

    vocab_size: int

    def targets(self) -> dict[str, Target]:
        """Every tensor that the checkpoint must hold, by name; those of the maker's layers
        included."""

    def unused(self) -> Collection[str]:
        """Tensors that the checkpoint may hold and the model does not read, as globs: a tied head
        that was saved too."""

    def forward(self, token_ids: Array, positions: Array, attend: Attend) -> Array:
        """`token_ids, positions: i64[T]` → hidden states `[T, H]`, the final norm applied."""

    def logits(self, hidden: Array) -> Array:
        """Hidden states `[R, H]` of the rows to sample → `f32[R, V]`."""


class Architecture(Protocol):
    """What an architecture provider builds: makes models of the architectures that it declares."""

    def model(self, build: ModelBuild) -> Model:
        """Make the model of a checkpoint. Raises `CheckpointError` naming the file and the key of
        what it cannot serve."""
