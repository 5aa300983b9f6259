"""What the Triton kernels are compiled for in tests: tests/test_triton_kernels.py of the repository
compiles these cases.

The first case of each kernel is the one that `make test` compiles.
"""

from __future__ import annotations

from dovetail_testing.triton_kernels import KernelCase


def cases() -> list[KernelCase]:
    return [
        KernelCase(
            "noise",
            "dovetail_worker_torch.sampling.triton_sampler:gumbel_noise_kernel",
            {"logits": "*fp32", "keys": "*i32", "row_stride": "i32"},
            {"SIZE": 128256, "BLOCK": 2048},
        ),
    ]


CASES = cases()
