"""Define model code: ragged tokens in, hidden states out. The worker supplies attention, linear
layers and the checkpoint's tensors.

The T tokens of a step are the rows of a ragged batch laid end to end, prefill chunks and decode
tokens alike: there is no batch dimension, no padding and no mask. A model knows nothing of
sequences, blocks or caches: each layer passes its queries, keys and values to `attend` and gets the
attention output. A model asks for its linear layers by name (`LayerMaker`) and so gets those that
fit the machine and the selected quantization.
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
    """Capabilities of an architecture provider, as data."""

    architectures: tuple[str, ...] | None
    """Names as in `architectures` of a config.json. None means any."""
    framework: str = "torch"
    quantization: bool = True
    """The linear layers come from the `LayerMaker`, so that a scheme can supply them."""
    loads_weights: bool = False
    """`model` returns with its weights loaded. Otherwise the worker reads the tensors in
    `targets`."""
    examples: tuple[dict[str, Any], ...] = ()
    """Contents of config.json of tiny models, at least one per architecture, for the conformance
    tests."""
    compiled: Literal["operations", "torch.compile"] | None = None
    """How a worker can compile the steps of its models. "operations": they are `CompilableModel`s
    (interfaces/compiled.py). "torch.compile": `model` compiles where `ModelBuild.compiled` is set.
    None: not at all."""
    fused: bool = False
    """Its models have fused GPU kernels, in Triton: see `ModelBuild.fused`."""


class Target(NamedTuple):
    """The destination of one of the checkpoint's tensors."""

    shape: tuple[int, ...]
    """Shape in the file."""
    dtype: Any
    """Dtype in memory. Floating-point types are converted; any other must be stored in this
    dtype."""
    store: Callable[[Array], object]
    """Called with the tensor as stored in the file: a view of the mapped file, valid for this call
    only. Raises `CheckpointError` for impossible values; the caller adds the location."""
    asked_by: str = "the model's config"
    """Source of the claim that the tensor exists in this shape, for error messages."""

    @staticmethod
    def into(tensor: Array, shape: tuple[int, ...] | None = None) -> Target:
        """Return a target that copies into `tensor`, which may be part of another tensor. `shape`
        is the shape in the file, if it is to be broadcast to the tensor's."""
        return Target(tuple(tensor.shape) if shape is None else shape, tensor.dtype, tensor.copy_)

    def and_into(self, other: Target) -> Target:
        """Return a target that stores one tensor of the file in both destinations."""

        def store(tensor: Array) -> None:
            self.store(tensor)
            other.store(tensor)

        return self._replace(store=store)

    def transposed(self) -> Target:
        """Return a target for a checkpoint that stores the matrix transposed, as `[in, out]`."""
        return self._replace(shape=self.shape[::-1], store=lambda tensor: self.store(tensor.T))


class Linear(Protocol):
    """A linear layer, whatever the form of its weights."""

    def __call__(self, x: Array, dtype: Any = None) -> Array:
        """Compute `x [T, in]` → `[T, out]`, a new array of `dtype` (default: the dtype of x)."""

    def targets(self) -> dict[str, Target]:
        """Return the destinations of the checkpoint's tensors that it reads, by name."""


class Embedding(Linear, Protocol):
    """A table of vectors by token id, which may also be the output projection (tied)."""

    def rows(self, token_ids: Array) -> Array:
        """Look up `i64[T]` → `[T, in]`, a new array."""


class LayerMaker(Protocol):
    """Builds a model's layers; their weights are declared but not loaded yet."""

    def linear(self, name: str, parts: Sequence[Part], in_features: int, bias: bool) -> Linear:
        """Build a linear layer. `name` is its full name ("model.layers.3.mlp.down_proj"). The parts
        have the full names of the checkpoint's layers and are concatenated in the output."""

    def embedding(self, name: str, vocab_size: int, size: int) -> Embedding:
        """Build an embedding. It is never quantized."""

    def tied(self, name: str, embedding: Embedding, of: str, vocab_size: int, size: int) -> Linear:
        """Build the output projection `name` ("lm_head") of a model that ties it to `embedding`,
        whose name is `of`. Returns the embedding itself, or a separate layer that also reads the
        embedding's tensor if a quantization rule requires one."""

    def attention(self, name: str, layer: AttentionLayer) -> AttentionLayer:
        """Return the layer with the scales of its keys and values, if the checkpoint has any.
        `name` is that of the module in the checkpoint ("model.layers.3.self_attn")."""


class WeightFiles(Protocol):
    """The weight files of a model's folder. Every method raises `CheckpointError`, naming the
    file."""

    def check(self) -> int:
        """Open every file. Return the bytes of all."""

    def are_equal(self, name: str, other: str) -> bool:
        """Return whether two tensors hold the same numbers. False if one is missing."""


@dataclass(frozen=True)
class ModelBuild:
    """Inputs of `Architecture.model`."""

    folder: Path
    config: Mapping[str, Any]
    """The contents of config.json."""
    tensor_names: frozenset[str]
    """Names of the tensors in the checkpoint."""
    layers: LayerMaker
    dtype: Any
    """Dtype of weights and hidden states; like `device`, an object of the framework."""
    device: Any
    progress: Progress
    """Progress callback, for models that load their weights themselves."""
    files: WeightFiles | None = None
    """None: the tensors do not come from files."""
    compiled: bool = False
    """For `compiled="torch.compile"`: the model's steps are to be compiled. Raises `ConfigError` if
    that is not possible here."""
    fused: bool = False
    """For `fused`: use fused GPU kernels. Triton is installed, and the device is a GPU."""


class Attend(Protocol):
    """Computes the attention of a step, for all layers."""

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Write k and v to the layer's cache, then attend: `q [T, Hq, D]`, `k, v [T, Hkv, D]` →
        `[T, Hq, D]`.

        All arguments are contiguous, in the model's dtype, and valid for this call only. The result
        is valid until the next call.
        """


class Model(Protocol):
    """A decoder-only language model. `forward` and `logits` keep no state."""

    attention_layers: list[AttentionLayer]
    """The attention layers in order: `attention_layers[i].index == i`, and `attend` is called with
    each index once per forward pass."""

    vocab_size: int

    def targets(self) -> dict[str, Target]:
        """Return the destinations of all tensors that the checkpoint must contain, by name,
        including those of the layers from the `LayerMaker`."""

    def unused(self) -> Collection[str]:
        """Return globs for tensors that the checkpoint may contain and the model does not read,
        such as the copy of a tied head."""

    def forward(self, token_ids: Array, positions: Array, attend: Attend) -> Array:
        """Compute `token_ids, positions: i64[T]` → hidden states `[T, H]` after the final norm."""

    def logits(self, hidden: Array) -> Array:
        """Compute hidden states `[R, H]` of the rows to sample → `f32[R, V]`."""


class Architecture(Protocol):
    """The object that an architecture provider builds. It constructs models of the architectures
    that it declares."""

    def model(self, build: ModelBuild) -> Model:
        """Build the model of a checkpoint. Raises `CheckpointError`, naming the file and the key
        that is not supported."""
