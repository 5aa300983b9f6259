"""GPTQ: rounding one input after the other, each error made up for by the inputs that are still to
come.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers, arXiv 2210.17323, algorithm 1. H is the Hessian of the squared error of a
layer's outputs, X Xᵀ (a factor does not matter). Beyond the paper, a group's scale is the one with
which the errors of its own columns, each by what it will cost, are least.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dovetail_quantize.rounding import Grid, Rounded, RowGrid, fit_least

BLOCK = 128
"""Columns between two updates of all that follow."""


def round_in_sequence(
    weight: Tensor, gram: Tensor, grid: Grid | RowGrid, *, desc_act: bool, damp: float
) -> Rounded:
    """`weight f32[out, in]` to codes that keep `weight @ x` for the inputs whose X Xᵀ is `gram
    f32[in, in]`.

    `desc_act`: inputs in the order of their size, and groups in that order.
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
            if (
                i % size == 0
                # the group as the columns before have left it; what its own columns will add is
                # unknown
            ):
                group = w[:, i : i + size].clone()
                late = slice(
                    end - i, size
                )  # columns of later blocks, which have not seen this block's errors yet
                if end - i < size:
                    group[:, late] -= errors @ upper[begin:end, end : i + size]
                scale, zero = fit_least(grid, group, _cost(upper.diagonal()[i : i + size]))
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
    back = order.argsort()
    return Rounded(
        codes[:, back].to(grid.codes), torch.stack(scales, 1), torch.stack(zeros, 1).int(), groups
    )


def _cost(diagonal: Tensor) -> Callable[[Tensor], Tensor]:
    """Of differences [out, size] in columns whose diagonal of U is given: the paper's equation 2,
    summed over columns."""
    return lambda difference: (difference / diagonal).square().sum(-1)


def _inverse_root(gram: Tensor, damp: float) -> Tensor:
    """Upper triangular U, with Uᵀ U the inverse of the damped Hessian (the paper's Cholesky(H⁻¹)ᵀ).

    In float64: Hessians of few samples are nearly singular. An input that was never active has a
    diagonal of one.
    """
    h = gram.double()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    upper: Tensor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True
    )
    return upper.float()
