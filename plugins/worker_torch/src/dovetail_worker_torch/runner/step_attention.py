"""A step's attention, for a model's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from dovetail.errors import PluginError
from dovetail.interfaces.attention import AttentionBackend, AttentionLayer
from dovetail.interfaces.compiled import CompiledAttention
from dovetail.types import KVGroup
from dovetail_worker_torch.runner.shadow import ShadowAttention


class StepAttention:
    """Attention for a model's layers, by the backend, cache and plan of each: an `Attend`."""

    def __init__(
        self,
        layers: list[AttentionLayer],
        groups: list[KVGroup],
        backends: list[AttentionBackend],
        caches: dict[int, object],
        provider_names: Mapping[str, str],
        shadow: ShadowAttention | None = None,
    ) -> None:
        self._provider_names, self._shadow = provider_names, shadow
        self.plans: list[object] = [None] * len(groups)
        """Of this step, by group."""
        self._layers, self._backends, self._caches = layers, backends, caches
        self._group_of = {layer: i for i, g in enumerate(groups) for layer in g.layers}
        self._kinds = [g.kind for g in groups]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group, fixed = self._group_of[layer], self._layers[layer]
        if q.shape[1:] != (fixed.num_heads, fixed.head_size) or not k.shape == v.shape == (
            len(q),
            fixed.num_kv_heads,
            fixed.head_size,
        ):
            raise ValueError(
                f"attend: layer {layer} was given q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}"
            )
        if self._shadow is None:
            return self._run(group, fixed, q, k, v)
        return self._shadow.run(
            group,
            fixed,
            q,
            k,
            v,
            self._backends[group],
            self._caches[layer],
            lambda: self._run(group, fixed, q, k, v),
        )

    def _run(self, group: int, fixed: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer, out = fixed.index, torch.empty_like(q)
        self._backends[group].run(fixed, q, k, v, self._caches[layer], self.plans[group], out)
        if out.shape != q.shape or out.dtype != q.dtype:
            what = f"layer {layer}: `out` {[*q.shape]} {q.dtype} became {[*out.shape]} {out.dtype}"
            raise PluginError(
                what, provider=self._provider_names[f"attention.{self._kinds[group]}"]
            )
        return out

    def addresses(self) -> list[int]:
        backends = cast(
            list[CompiledAttention], self._backends
        )  # a compiled model is bound to no other
        of, plans = self._group_of, self.plans
        return [
            backends[of[layer.index]].address(layer, plans[of[layer.index]])
            for layer in self._layers
        ]
