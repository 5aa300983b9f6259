"""The decoder's fused kernels do what plain torch does, in Triton's interpreter, and compile for the GPUs that they are for."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import numpy as np
import pytest
import torch

from dovetail.testing.triton_kernels import KernelCase, compile_kernels, table
from dovetail_worker_torch.drawing import TorchDrawing
from dovetail_worker_torch.fused import TritonDrawing, TritonOperations
from dovetail_worker_torch.noise import row_keys
from dovetail_worker_torch.operations import ACTIVATIONS, TorchOperations
from dovetail_worker_torch.rope import RotaryEmbedding

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
    hidden, delta, weight = (torch.randn(*shape, dtype=dtype) for shape in ((rows, size), (rows, size), (size,)))
    close(TRITON.rms_norm(hidden, weight, 1e-5), TORCH.rms_norm(hidden, weight, 1e-5))
    ours, theirs = hidden.clone(), hidden.clone()
    close(TRITON.add_rms_norm(ours, delta, weight, 1e-5), TORCH.add_rms_norm(theirs, delta, weight, 1e-5))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "num_heads", "num_kv_heads", "size"), [(0, 2, 1, 16), (1, 4, 4, 16), (3, 14, 2, 64), (2, 9, 3, 80)]
)
def test_rotations(dtype, has_norm, tokens, num_heads, num_kv_heads, size):
    qkv = torch.randn(tokens, num_heads + 2 * num_kv_heads, size, dtype=dtype)
    norm = torch.randn(num_heads + num_kv_heads, size, dtype=dtype) if has_norm else None
    rotary = RotaryEmbedding(1.0 / 10000 ** (torch.arange(size // 2) / (size // 2)), 1.0, dtype, torch.device("cpu"))
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


def test_noise():
    """The same noise, so that a request says the same on every device: to rounding."""
    rng = np.random.default_rng()
    keys = row_keys(rng.integers(0, 2**62, 3), rng.integers(0, 9, 3), rng.integers(0, 9999, 3))
    logits = torch.randn(3, 5000)
    ours, theirs = logits.clone(), logits.clone()
    TritonDrawing().perturb_(ours, keys)
    TorchDrawing().perturb_(theirs, keys)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, logits)


def cases() -> list[KernelCase]:
    module, norm = "dovetail_worker_torch.fused", {"hidden": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32"}
    return [
        KernelCase(
            f"norm of {size}", f"{module}:rms_norm_kernel", {**norm, "delta": "*bf16", "row_stride": "i32:16"},
            {"SIZE": size, "WIDTH": size, "HAS_DELTA": True, "INTERPRETED": False}, 4 if size <= 4096 else 8,
        ) for size in (2048, 4096, 8192)
    ] + [
        KernelCase(
            "rotation", f"{module}:rotate_kernel",
            {**dict.fromkeys(("qkv", "norm", "cos", "sin", "q", "k", "v"), "*bf16"), "eps": "fp32", "row_stride": "i32:16"},
            {"NUM_Q": 32, "NUM_KV": 8, "HALF": 64, "WIDTH": 64, "HEADS": 8, "HAS_NORM": True, "INTERPRETED": False}, 2,
        ),
        KernelCase(
            "activation", f"{module}:gated_kernel", {"gate_up": "*bf16", "out": "*bf16", "row_stride": "i32:16"},
            {"SIZE": 14336, "BLOCK": 1024, "ACTIVATION": "silu", "INTERPRETED": False},
        ),
        KernelCase(
            "noise", f"{module}:perturb_kernel", {"logits": "*fp32", "keys": "*i32", "row_stride": "i32"},
            {"SIZE": 128256, "BLOCK": 2048},
        ),
    ]  # fmt: skip


def test_they_compile(capsys):
    compiled = compile_kernels(cases())
    with capsys.disabled():
        print(f"\n{table(compiled)}")
    assert [c for c in compiled if c.spilled_bytes] == []
