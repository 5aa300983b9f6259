"""Paged attention for x86-64 CPUs in C++, compiled for the host CPU on first use.

This module registers the provider and imports no tensor library.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dovetail.facts import DeviceFacts
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.native import Target, build_library, openmp_of
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider, why_not_built

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_attention_cpu.backend import CpuAttention

CAPABILITIES = AttentionCapabilities(
    head_sizes=tuple(range(16, 257, 16)),
    block_sizes=tuple(range(16, 257, 16)),
    kv_dtypes=("float32", "bfloat16", "float16", "float8_e4m3fn", "int8"),
    sliding_window=True,
    logit_soft_cap=True,
    sinks=True,
    batch_invariant=True,
    compiled_steps=True,
    kv_layout="HND-packed16",
)
SOURCES = Path(__file__).parent / "csrc"
NEEDED_FLAGS = ("avx2", "fma", "f16c")


class CpuOptions(Options):
    target: Literal["native", "avx2"] = Field(
        "native",
        description=(
            "instruction set to compile for: that of this CPU, or AVX2 only (slower; for"
            " comparison)"
        ),
    )


def why_not(context: Context) -> list[Reason]:
    return why_not_built(context.device, NEEDED_FLAGS)


def load_kernel(facts: DeviceFacts, target: Target = "native") -> Path:
    """Return the path of the compiled library. It uses PyTorch's OpenMP threads."""
    return build_library("attention-cpu", SOURCES, facts, target=target, openmp=openmp_of("torch"))


def build(context: BuildContext, options: CpuOptions) -> CpuAttention:
    from dovetail_attention_cpu.backend import CpuAttention

    return CpuAttention(load_kernel(context.device, options.target))


PROVIDER = Provider(
    "attention-cpu",
    "paged attention in C++ for x86-64 CPUs (AVX-512 with BF16 if available)",
    build,
    CpuOptions,
    CAPABILITIES,
    why_not,
    priority=50,
)


@hookimpl
def dovetail_attention() -> list[Provider[CpuAttention]]:
    return [PROVIDER]
