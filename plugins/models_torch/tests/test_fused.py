"""The decoder's fused kernels do what plain torch does, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import pytest
import torch

from dovetail_models_torch.fused import TritonOperations
from dovetail_models_torch.operations import ACTIVATIONS, TorchOperations
from dovetail_models_torch.rope import RotaryEmbedding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TORCH, TRITON = TorchOperations(), TritonOperations()


def close(ours, theirs, atol=4):
    """To a few roundings of the dtype; `atol` of numbers about 1."""
    assert ours.dtype == theirs.dtype
    step = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=4 * step, atol=atol * step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 64), (3, 80), (5, 1000)])
def test_norms(dtype, rows, size):
    hidden, delta, weight = (
        torch.randn(*shape, dtype=dtype) for shape in ((rows, size), (rows, size), (size,))
    )
    close(TRITON.rms_norm(hidden, weight, 1e-5), TORCH.rms_norm(hidden, weight, 1e-5))
    ours, theirs = hidden.clone(), hidden.clone()
    close(
        TRITON.add_rms_norm(ours, delta, weight, 1e-5),
        TORCH.add_rms_norm(theirs, delta, weight, 1e-5),
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "num_heads", "num_kv_heads", "size"),
    [(0, 2, 1, 16), (1, 4, 4, 16), (3, 14, 2, 64), (2, 9, 3, 80)],
)
def test_rotations(dtype, has_norm, tokens, num_heads, num_kv_heads, size):
    qkv = torch.randn(tokens, num_heads + 2 * num_kv_heads, size, dtype=dtype)
    norm = torch.randn(num_heads + num_kv_heads, size, dtype=dtype) if has_norm else None
    rotary = RotaryEmbedding(
        1.0 / 10000 ** (torch.arange(size // 2) / (size // 2)), 1.0, dtype, torch.device("cpu")
    )
    cos, sin = rotary(torch.randint(0, 5000, (tokens,)))
    ours = TRITON.rotated(qkv, num_heads, num_kv_heads, norm, 1e-6, cos, sin)
    theirs = TORCH.rotated(qkv, num_heads, num_kv_heads, norm, 1e-6, cos, sin)
    for own, other in zip(ours, theirs, strict=True):
        assert own.is_contiguous()
        assert own.shape == other.shape
        close(own, other, atol=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(dtype, activation):
    gate_up = torch.randn(3, 2 * 1500, dtype=dtype) * 3
    close(TRITON.gated(gate_up, activation), TORCH.gated(gate_up, activation), atol=32)
