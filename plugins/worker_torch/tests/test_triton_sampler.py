"""The sampler's Triton kernel does what plain torch does, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import numpy as np
import torch

from dovetail_worker_torch.sampling.backends import TorchSampler
from dovetail_worker_torch.sampling.noise import row_keys
from dovetail_worker_torch.sampling.triton_sampler import TritonSampler


def test_noise():
    """The same noise, so that a request says the same on every device: to rounding."""
    rng = np.random.default_rng()
    keys = row_keys(rng.integers(0, 2**62, 3), rng.integers(0, 9, 3), rng.integers(0, 9999, 3))
    logits = torch.randn(3, 5000)
    ours, theirs = logits.clone(), logits.clone()
    TritonSampler().add_gumbel_noise_(ours, keys)
    TorchSampler().add_gumbel_noise_(theirs, keys)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, logits)
