"""Provide checkpoints with random weights for tiny models, and steps to run them in, with an
attention that is slow and obviously correct."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dovetail.interfaces.architecture import Embedding, Linear, Model, Target
from dovetail.interfaces.attention import AttentionLayer
from dovetail.interfaces.quantization import Part
from dovetail_testing.contract import Broken

if TYPE_CHECKING:
    from torch import Tensor


class PlainLinear:
    """A linear layer with exactly the interface of the contract."""

    def __init__(
        self, maker: PlainLayers, name: str, parts: Sequence[Part], in_features: int, bias: bool
    ) -> None:
        import torch

        out_features = sum(part.out_features for part in parts)
        self._maker, self._name, self._parts = maker, name, parts
        self._weight = torch.full((out_features, in_features), float("nan"), dtype=maker.dtype)
        self._bias = torch.full((out_features,), float("nan"), dtype=maker.dtype) if bias else None

    def __call__(self, x: Tensor, dtype: Any = None) -> Tensor:
        import torch.nn.functional as F

        self._maker.used.add(self._name)
        if x.ndim != 2 or x.shape[1] != self._weight.shape[1] or x.dtype != self._weight.dtype:
            size = f"[T, {self._weight.shape[1]}] {self._weight.dtype}"
            raise Broken(
                f"{self._name} was called with {list(x.shape)} {x.dtype}, but needs {size}"
            )
        return F.linear(x, self._weight, self._bias).to(dtype or x.dtype)

    def rows(self, token_ids: Tensor) -> Tensor:
        import torch.nn.functional as F

        self._maker.used.add(self._name)
        return F.embedding(token_ids, self._weight)

    def targets(self) -> dict[str, Target]:
        found, start = {}, 0
        for part in self._parts:
            rows = slice(start, start + part.out_features)
            found[f"{part.name}.weight"] = Target.into(self._weight[rows])
            if self._bias is not None:
                found[f"{part.name}.bias"] = Target.into(self._bias[rows])
            start = rows.stop
        return found


class PlainLayers:
    """A `LayerMaker` that records which layers were requested and used."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.linears: list[str] = []
        self.embeddings: list[str] = []
        self.attention_layers: list[AttentionLayer] = []
        self.used: set[str] = set()

    def linear(self, name: str, parts: Sequence[Part], in_features: int, bias: bool) -> PlainLinear:
        self.linears.append(name)
        return PlainLinear(self, name, parts, in_features, bias)

    def embedding(self, name: str, vocab_size: int, size: int) -> PlainLinear:
        self.embeddings.append(name)
        return PlainLinear(self, name, [Part(name, vocab_size)], size, False)

    def tied(self, name: str, embedding: Embedding, of: str, vocab_size: int, size: int) -> Linear:
        return embedding

    def attention(self, name: str, layer: AttentionLayer) -> AttentionLayer:
        self.attention_layers.append(replace(layer))
        return self.attention_layers[-1]


def random_tensors(targets: dict[str, Target], seed: int) -> dict[str, Tensor]:
    """Create a checkpoint for a model in which no value is neutral."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, target in sorted(targets.items()):
        tensor = torch.randn(target.shape, generator=generator) * (
            0.1 if len(target.shape) > 1 else 0.3
        )
        # A one-dimensional weight belongs to a norm.
        tensors[name] = tensor + 1 if len(target.shape) == 1 and name.endswith("weight") else tensor
    return tensors


def store(model: Model, tensors: dict[str, Tensor]) -> None:
    """Store tensors as a worker would: each is passed as a view that is valid only for the call."""
    for name, target in model.targets().items():
        lent = tensors[name].clone()
        if tuple(lent.shape) != target.shape:
            raise Broken(
                f"target {name} has shape {list(target.shape)}, but {list(lent.shape)} in the first"
                " model"
            )
        target.store(lent)
        lent.fill_(float("nan"))


@dataclass
class DenseAttention:
    """An `Attend` over sequences whose keys and values are stored in lists. Its results are valid
    until the next call."""

    layers: list[AttentionLayer]
    dtype: Any
    rows: list[tuple[int, int]] = field(default_factory=list)
    """(sequence, number of tokens) of the step, in batch order."""
    called: list[int] = field(default_factory=list)
    """Layers called in this step."""

    def __post_init__(self) -> None:
        self._keys: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self._values: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self._last: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        import torch

        if self._last is not None:
            self._last.fill_(float("nan"))
        self.called.append(layer)
        of, count = self.layers[layer], sum(n for _, n in self.rows)
        for what, tensor, heads in (
            ("q", q, of.num_heads),
            ("k", k, of.num_kv_heads),
            ("v", v, of.num_kv_heads),
        ):
            shape = (count, heads, of.head_size)
            if tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
                raise Broken(
                    f"{what} of layer {layer} is {list(tensor.shape)} {tensor.dtype}, not"
                    f" {list(shape)} {self.dtype}"
                )
            if not tensor.is_contiguous():
                raise Broken(f"{what} of layer {layer} is not contiguous")
        out, start = torch.empty_like(q), 0
        for sequence, n in self.rows:
            rows = slice(start, start := start + n)
            self._keys[layer, sequence].extend(k[rows].clone())
            self._values[layer, sequence].extend(v[rows].clone())
            out[rows] = self._attend(of, sequence, q[rows].float()).to(self.dtype)
        self._last = out
        return out

    def _attend(self, layer: AttentionLayer, sequence: int, q: Tensor) -> Tensor:
        import torch

        group = layer.num_heads // layer.num_kv_heads
        k = torch.stack(self._keys[layer.index, sequence]).float().repeat_interleave(group, 1)
        v = torch.stack(self._values[layer.index, sequence]).float().repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", q, k) * layer.scale
        if layer.logit_soft_cap is not None:
            logits = layer.logit_soft_cap * torch.tanh(logits / layer.logit_soft_cap)
        distance = (len(k) - len(q) + torch.arange(len(q)))[:, None] - torch.arange(len(k))
        visible = (distance >= 0) & (distance < (layer.window or len(k)))
        logits = logits.masked_fill(~visible, -torch.inf)
        if layer.sinks is not None:
            logits = torch.cat((logits, layer.sinks[:, None, None].expand(-1, len(q), 1)), -1)
        return torch.einsum("hqk,khd->qhd", logits.softmax(-1)[..., : len(k)], v)


def run_step(
    model: Model, attention: DenseAttention, rows: list[tuple[int, range]], prompts: list[list[int]]
) -> Tensor:
    """Run one forward pass over spans of some sequences; return hidden states `[T, H]`."""
    import torch

    attention.rows, attention.called = [(i, len(span)) for i, span in rows], []
    token_ids = torch.tensor([prompts[i][p] for i, span in rows for p in span])
    positions = torch.tensor([p for _, span in rows for p in span])
    given = token_ids.clone(), positions.clone()
    with torch.inference_mode():
        hidden: Tensor = model.forward(token_ids, positions, attention)
    if not (torch.equal(given[0], token_ids) and torch.equal(given[1], positions)):
        raise Broken("forward modified its token_ids or positions")
    return hidden.clone()


def whole_logits(model: Model, prompt: list[int], dtype: Any) -> Tensor:
    """Return f32[T, V] of a single prompt, computed in one step."""
    import torch

    hidden = run_step(
        model, DenseAttention(model.attention_layers, dtype), [(0, range(len(prompt)))], [prompt]
    )
    with torch.inference_mode():
        logits: Tensor = model.logits(hidden)
    return logits


def ragged_logits(
    model: Model, prompts: list[list[int]], dtype: Any, rng: random.Random
) -> list[Tensor]:
    """Return the same for several prompts, in steps with 0 to 6 tokens per sequence, in any
    order."""
    import torch

    attention = DenseAttention(model.attention_layers, dtype)
    done, pieces = [0] * len(prompts), [[] for _ in prompts]  # type: ignore[var-annotated]
    while any(n < len(p) for n, p in zip(done, prompts, strict=True)):
        spans = [
            (i, range(n, min(len(p), n + rng.choice([0, 1, 1, 3, 6]))))
            for i, (n, p) in enumerate(zip(done, prompts, strict=True))
        ]
        rows = [row for row in rng.sample(spans, len(spans)) if row[1]]
        if not rows:
            continue
        hidden = run_step(model, attention, rows, prompts)
        with torch.inference_mode():
            logits = model.logits(hidden).split([len(span) for _, span in rows])
        for (i, span), part in zip(rows, logits, strict=True):
            pieces[i].append(part.clone())
            done[i] = span.stop
    return [torch.cat(parts) for parts in pieces]
