"""What the Triton kernels are compiled for in tests: tests/test_triton_kernels.py of the repository
compiles these cases.

The first case of each kernel is the one that `make test` compiles.
"""

from __future__ import annotations

from dovetail_testing.triton_kernels import KernelCase


def cases() -> list[KernelCase]:
    module, norm = (
        "dovetail_models_torch.fused",
        {"hidden": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32"},
    )
    return [
        KernelCase(
            f"norm of {size}",
            f"{module}:rms_norm_kernel",
            {**norm, "delta": "*bf16", "row_stride": "i32:16"},
            {"SIZE": size, "WIDTH": size, "HAS_DELTA": True, "INTERPRETED": False},
            4 if size <= 4096 else 8,
        )
        for size in (2048, 4096, 8192)
    ] + [
        KernelCase(
            "rotation",
            f"{module}:rotate_kernel",
            {
                **dict.fromkeys(("qkv", "norm", "cos", "sin", "q", "k", "v"), "*bf16"),
                "eps": "fp32",
                "row_stride": "i32:16",
            },
            {
                "NUM_Q": 32,
                "NUM_KV": 8,
                "HALF": 64,
                "WIDTH": 64,
                "HEADS": 8,
                "HAS_NORM": True,
                "INTERPRETED": False,
            },
            2,
        ),
        KernelCase(
            "activation",
            f"{module}:gated_kernel",
            {"gate_up": "*bf16", "out": "*bf16", "row_stride": "i32:16"},
            {"SIZE": 14336, "BLOCK": 1024, "ACTIVATION": "silu", "INTERPRETED": False},
        ),
    ]


CASES = cases()
