"""GEMM with quantized weights for NVIDIA GPUs in Triton, and `dovetail tune`, which measures the
fastest kernels.

This module registers the provider and the command, and imports neither Triton nor torch.
"""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from pydantic import Field

from dovetail.interfaces.command import Command
from dovetail.interfaces.matmul import MatmulCapabilities
from dovetail.interfaces.worker import Progress
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, Options, Provider, why_not_gpu

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_matmul_cuda.matmul import TritonMatmul

CAPABILITIES = MatmulCapabilities(
    codes=("int8", "uint4", "float8_e4m3fn"), inputs=("int8", "float8_e4m3fn"), devices=("cuda",)
)


class TritonOptions(Options):
    table: str | None = Field(
        None, description="a file that `dovetail tune` wrote; default: the one for this GPU, if any"
    )


def why_not(context: Context) -> list[Reason]:
    # FP8 products require sm_89 (Ada). FP8 weights with unquantized inputs are dequantized on any
    # GPU.
    is_fp8 = "float8_e4m3fn" in context.needs.get("inputs", ())
    reasons = why_not_gpu(context, (8, 9) if is_fp8 else (8, 0))
    if importlib.util.find_spec("triton") is None:
        reasons.append(
            Reason(
                "Triton is not installed",
                "pip install triton; PyTorch's CUDA builds include it",
            )
        )
    return reasons


def build(context: BuildContext, options: TritonOptions) -> TritonMatmul:
    from dovetail_matmul_cuda.matmul import TritonMatmul

    return TritonMatmul.on(context.plan.device, options.table)


PROVIDER = Provider(
    "triton",
    "8-bit and 4-bit weights in Triton for NVIDIA GPUs (sm_80 and newer), FP8 in cuBLAS",
    build,
    TritonOptions,
    CAPABILITIES,
    why_not,
    priority=50,
)


@hookimpl
def dovetail_matmuls() -> list[Provider[TritonMatmul]]:
    return [PROVIDER]


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("kernels",),
        help="GEMM with quantized weights, on the GPUs of this machine",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--model",
        metavar="FOLDER",
        help="a checkpoint or its config.json, for the shapes of its layers",
    )
    which.add_argument(
        "--shapes", metavar="LIST", help="outputs x inputs, such as 4096x14336,6144x4096"
    )
    parser.add_argument(
        "--formats",
        default="uint4-128",
        metavar="LIST",
        help=(
            "codes, group size and quantized inputs, such as uint4-128,int8,int8:int8,float8:float8"
            " (default uint4-128)"
        ),
    )
    parser.add_argument(
        "--rows",
        default="1,4,16,32,64,128,256,512,1024,4096",
        metavar="LIST",
        help="numbers of rows (default %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16"),
        help="dtype of the inputs (default bfloat16)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="table to write or complete (default: the user's table for this GPU)",
    )


def _run(args: Namespace, progress: Progress) -> int:
    from dovetail_matmul_cuda.tune import run

    return run(args, progress)


TUNE = Command(
    "measure kernels on this machine's GPUs, so that the fastest are selected", _add_arguments, _run
)
