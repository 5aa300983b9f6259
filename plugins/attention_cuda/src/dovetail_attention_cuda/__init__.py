"""PagedAttention for NVIDIA GPUs, in Triton.

This module is the light root: it offers the provider and imports neither Triton nor torch.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from dovetail.hookspecs import hookimpl
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.provider import Context, Options, Provider, Reason, why_not_gpu

if TYPE_CHECKING:
    from dovetail.compose import BuildContext
    from dovetail_attention_cuda.backend import TritonAttention

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


class TritonOptions(Options):
    """This provider has no options."""


def why_no_triton(context: Context) -> list[Reason]:
    # FP8 arithmetic came with Ada: before it Triton has no E4M3.
    is_fp8 = context.needs.get("kv_dtype") == "float8_e4m3fn"
    reasons = why_not_gpu(context, (8, 9) if is_fp8 else (8, 0))
    if importlib.util.find_spec("triton") is None:
        reasons.append(Reason("Triton is not installed", "pip install triton; PyTorch's CUDA builds bring it along"))
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


@hookimpl
def dovetail_attention() -> list[Provider[TritonAttention]]:
    return [TRITON]
