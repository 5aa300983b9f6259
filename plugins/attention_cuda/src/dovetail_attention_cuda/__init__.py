"""PagedAttention for NVIDIA GPUs, in Triton and in CUDA C++.

This module registers the providers and imports neither Triton nor torch.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.native import build_cuda_library
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider, why_not_gpu

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_attention_cuda.backend import TritonAttention
    from dovetail_attention_cuda.native import CudaAttention

TRITON_CAPABILITIES = AttentionCapabilities(
    devices=("cuda",),
    kv_dtypes=("float32", "bfloat16", "float16", "float8_e4m3fn", "int8"),
    head_sizes=(16, 32, 64, 80, 96, 112, 128, 160, 192, 256),
    block_sizes=(8, 16, 32, 64, 128, 256),
    sliding_window=True,
    logit_soft_cap=True,
    sinks=True,
    graph_capture=True,
    kv_layout="HND",
)


CUDA_CAPABILITIES = replace(
    TRITON_CAPABILITIES, head_sizes=tuple(range(16, 257, 16)), block_sizes=tuple(range(8, 257, 8))
)
SOURCES = Path(__file__).parent / "csrc"


class TritonOptions(Options):
    """This provider has no options."""


def why_no_triton(context: Context) -> list[Reason]:
    # Triton supports E4M3 only on GPUs with FP8 arithmetic, which is sm_89 (Ada) and newer.
    is_fp8 = context.needs.get("kv_dtype") == "float8_e4m3fn"
    reasons = why_not_gpu(context, (8, 9) if is_fp8 else (8, 0))
    if importlib.util.find_spec("triton") is None:
        reasons.append(
            Reason(
                "Triton is not installed",
                "pip install triton; PyTorch's CUDA builds include it",
            )
        )
    return reasons


def build_triton(context: BuildContext, options: TritonOptions) -> TritonAttention:
    from dovetail_attention_cuda.backend import TritonAttention

    return TritonAttention(context.plan.device)


TRITON = Provider(
    "triton",
    "PagedAttention in Triton for NVIDIA GPUs (sm_80 and newer)",
    build_triton,
    TritonOptions,
    TRITON_CAPABILITIES,
    why_no_triton,
    priority=50,
)


class CudaOptions(Options):
    """This provider has no options."""


def why_no_cuda(context: Context) -> list[Reason]:
    reasons = why_not_gpu(context)
    if context.device.nvcc is None:
        reasons.append(
            Reason("CUDA's compiler was not found", "install the CUDA toolkit, or set CUDA_HOME")
        )
    return reasons


def build_cuda(context: BuildContext, options: CudaOptions) -> CudaAttention:
    import torch

    from dovetail_attention_cuda.native import CudaAttention

    device = torch.device(context.plan.device)
    gpu = context.device.gpus[device.index or 0]
    library = build_cuda_library("attention-cuda", SOURCES, context.device, [gpu.architecture])
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return CudaAttention(library, context.plan.device, num_sms)


CUDA = Provider(
    "cuda",
    "PagedAttention in CUDA C++ for NVIDIA GPUs (sm_80 and newer), for systems without"
    " Triton; prefill is slow",
    build_cuda,
    CudaOptions,
    CUDA_CAPABILITIES,
    why_no_cuda,
    priority=20,
)


@hookimpl
def dovetail_attention() -> list[Provider[Any]]:
    return [TRITON, CUDA]
