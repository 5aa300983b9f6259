"""Implement GPTQ: quantize one input channel after the other, and compensate each error in the
channels that remain.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers, arXiv 2210.17323, algorithm 1. H is the Hessian of the squared error of a
layer's outputs, X Xᵀ (up to a constant factor). Beyond the paper, a group's scale minimizes the
errors of its own columns, weighted by their cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dovetail_quantize.rounding import Grid, PerChannelGrid, QuantizedWeight, fit_min_error

BLOCK = 128
"""Number of columns after which the error is propagated to all remaining columns."""


def gptq_quantize(
    weight: Tensor, gram: Tensor, grid: Grid | PerChannelGrid, *, desc_act: bool, damp: float
) -> QuantizedWeight:
    """Quantize `weight f32[out, in]` such that `weight @ x` is preserved for inputs whose X Xᵀ is
    `gram f32[in, in]`.

    With `desc_act`, channels are processed and grouped in descending order of their activations.
    """
    num_inputs = weight.shape[1]
    size = grid.size(num_inputs)
    order = (
        gram.diagonal().argsort(descending=True, stable=True)
        if desc_act
        else torch.arange(num_inputs)
    )
    w, upper = weight[:, order].clone(), _inverse_root(gram[order][:, order], damp)
    codes = torch.empty_like(w)
    scales, zeros = [], []
    for begin in range(0, num_inputs, BLOCK):
        end = min(begin + BLOCK, num_inputs)
        errors = torch.zeros_like(w[:, begin:end])
        for i in range(begin, end):
            if i % size == 0:
                # Fit the group to its columns as updated so far. The updates that its own columns
                # will cause are unknown.
                group = w[:, i : i + size].clone()
                # Columns of later blocks have not received this block's errors yet.
                late = slice(end - i, size)
                if end - i < size:
                    group[:, late] -= errors @ upper[begin:end, end : i + size]
                scale, zero = fit_min_error(grid, group, _cost(upper.diagonal()[i : i + size]))
                scales.append(scale)
                zeros.append(zero)
            column = w[:, i]
            codes[:, i] = grid.nearest(column, scale, zero)
            error = (column - (codes[:, i] - zero) * scale) / upper[i, i]
            w[:, i:end] -= error[:, None] * upper[i, i:end]
            errors[:, i - begin] = error
        w[:, end:] -= errors @ upper[begin:end, end:]
    groups = torch.empty(num_inputs, dtype=torch.int32)
    groups[order] = torch.arange(num_inputs, dtype=torch.int32) // size
    inverse_order = order.argsort()
    return QuantizedWeight(
        codes[:, inverse_order].to(grid.codes),
        torch.stack(scales, 1),
        torch.stack(zeros, 1).int(),
        groups,
    )


def _cost(diagonal: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function from weight errors [out, size] to their cost [out]: equation 2 of the paper
    summed over columns. `diagonal` is that of U for these columns."""
    return lambda difference: (difference / diagonal).square().sum(-1)


def _inverse_root(gram: Tensor, damp: float) -> Tensor:
    """Return the upper triangular U for which Uᵀ U is the inverse of the damped Hessian (the
    paper's Cholesky(H⁻¹)ᵀ).

    Computed in float64, because Hessians of few samples are nearly singular. Inputs that were never
    active get a diagonal of 1.
    """
    h = gram.double()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    upper: Tensor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True
    )
    return upper.float()
