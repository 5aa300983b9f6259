"""The Triton kernels compile for the GPUs that they are for, keep within their memories and spill nothing where it matters."""

from __future__ import annotations

import pytest

from dovetail.interfaces.matmul import WeightFormat
from dovetail.testing.triton_kernels import LARGEST_SHARED, KernelCase, compile_kernels, table
from dovetail_matmul_cuda import layout
from dovetail_matmul_cuda.choice import Case, by_rule

SMS = 132
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
CODES = {"int8": "i8", "float8_e4m3fn": "fp8e4nv"}
KINDS = {"uint4": "uint4", "int8": "int8", "float8_e4m3fn": "float8"}


def signature(constants: dict[str, object], given: dict[str, str], *missing: str) -> KernelCase:
    raise NotImplementedError


def words(format: WeightFormat, rows: int, outs: int = 4096, ins: int = 4096, dtype: str = "bfloat16") -> KernelCase:
    at, itemsize = layout.geometry(format, ins), 4 if dtype == "float32" else 2
    how = by_rule(Case.of(format, outs, ins, rows), ("words",), SMS, itemsize)
    num_chunks = at.num_places // layout.ROWS // layout.planes(format)
    is_rounded, is_split = format.inputs is not None, how.split_k > 1
    given = {
        "x": f"*{TYPES[dtype]}", "words": "*i32", "scales": "*fp32", "out": "*fp32" if is_split else f"*{TYPES[dtype]}",
        "num_rows": "i32", "num_outs": "i32:16", "x_row": "i32:16", "out_row": "i32:16",
        **({"zeros": "*u8"} if format.zeros else {}), **({"x_scales": "*fp32"} if is_rounded else {}),
    }  # fmt: skip
    constants = {
        "zeros": None, "x_scales": None, "bias": None, "IN": ins, "GROUP": at.group, "PADDED": at.padded,
        "NUM_CHUNKS": num_chunks, "KIND": KINDS[format.codes], "HAS_ZEROS": format.zeros, "IN_GROUPS": at.num_groups > 1,
        "HAS_X_SCALES": is_rounded, "HAS_BIAS": False, "BLOCK_M": how.block_m, "BLOCK_N": how.block_n, "SPLIT_K": how.split_k,
        "COMPUTE": f"tl.{dtype}", "INTERPRETED": False,
    }  # fmt: skip
    return KernelCase(
        f"words {format.codes}-{format.group_size}{' zeros' * format.zeros} {outs}x{ins} {rows} rows {dtype}",
        "dovetail_matmul_cuda.kernels:multiply_words", given, {k: v for k, v in constants.items() if k not in given},
        how.num_warps, how.num_stages,
    )  # fmt: skip


W4 = WeightFormat("uint4", 128)
TUNED = [words(W4, rows) for rows in (1, 32, 64, 128)]
if __name__ == "__main__":
    import sys
    print(table(compile_kernels(TUNED + [words(WeightFormat("uint4", 128, zeros=True), 1), words(W4, 1, 28672)], [int(a) for a in sys.argv[1:]] or [80, 90, 100])))
