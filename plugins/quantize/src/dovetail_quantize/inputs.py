"""Collect statistics of the inputs of linear layers while calibration text runs through a decoder
layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Inputs:
    """Statistics of the inputs of one linear layer over all tokens."""

    gram: Tensor
    """f32[in, in]: the mean of x xᵀ."""
    mean_abs: Tensor
    """f32[in]"""
    shared_by: tuple[str, ...]
    """Names of the linear layers that have this input, in their order."""
    dtype: torch.dtype
    """Dtype of the checkpoint."""

    def output_error(self, difference: Tensor) -> float:
        """Return the mean squared norm of `difference @ x`, for a weight error [out, in]."""
        return float(((difference @ self.gram) * difference).sum())

    def divided(self, scales: Tensor) -> Inputs:
        """Return the statistics after each channel is divided by its scale."""
        return replace(
            self, gram=self.gram / (scales[:, None] * scales), mean_abs=self.mean_abs / scales
        )


def measure(
    linears: Mapping[str, nn.Linear], dtype: torch.dtype, runs: Iterable[Callable[[], Any]]
) -> dict[str, Inputs]:
    """Measure the inputs of linear layers while calling each of `runs`. Layers that receive the
    same tensor are measured once."""
    first: dict[str, str] = {}
    grams: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    num_tokens: dict[str, int] = {}
    # Inputs of the current run. Holding the tensors keeps their identities unique.
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def measured(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            owner = next((other for other, y in seen if y is x), name)
            if first.setdefault(name, owner) != owner:
                raise RuntimeError(f"{name} shares its input with {owner} in some calls only")
            seen.append((name, x))
            if owner == name:
                rows = x.reshape(-1, x.shape[-1]).float()
                grams[name] = grams.get(name, 0) + rows.T @ rows
                sums[name] = sums.get(name, 0) + rows.abs().sum(0)
                num_tokens[name] = num_tokens.get(name, 0) + len(rows)

        return measured

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        for run in runs:
            run()
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for owner in grams:
        sharing = tuple(name for name in linears if first.get(name) == owner)
        n = num_tokens[owner]
        shared = Inputs(grams[owner] / n, sums[owner] / n, sharing, dtype)
        result.update(dict.fromkeys(sharing, shared))
    return {name: result[name] for name in linears if name in result}
