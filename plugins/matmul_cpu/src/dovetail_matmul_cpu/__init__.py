"""GEMM with quantized weights for x86-64 CPUs in C++, compiled for the host CPU on first use.

This module registers the provider and imports no tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.matmul import MatmulCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider, why_not_built

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_matmul_cpu.kernels import CpuMatmul

CAPABILITIES = MatmulCapabilities(
    codes=("int8", "uint4", "float8_e4m3fn"), inputs=("int8", "float8_e4m3fn"), compiled_steps=True
)
NEEDED_FLAGS = (
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_vnni",
    "avx512vbmi",
    "avx512_bf16",
)


def why_not(context: Context) -> list[Reason]:
    return why_not_built(context.device, NEEDED_FLAGS)


def build(context: BuildContext, options: Options) -> CpuMatmul:
    from dovetail_matmul_cpu.kernels import CpuMatmul

    return CpuMatmul(context.device)


PROVIDER = Provider(
    "cpu",
    "8-bit and 4-bit weights expanded in registers, in C++ (AVX-512 with VNNI)",
    build,
    capabilities=CAPABILITIES,
    why_not=why_not,
    priority=50,
)


@hookimpl
def dovetail_matmuls() -> list[Provider[CpuMatmul]]:
    return [PROVIDER]
