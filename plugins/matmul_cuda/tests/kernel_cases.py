"""The cases for which tests/test_triton_kernels.py of the repository compiles the Triton kernels.

The first case of each kernel is the one that `make test` compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.interfaces.matmul import WeightFormat
from dovetail_matmul_cuda import layout
from dovetail_matmul_cuda.choice import Case, by_rule
from dovetail_testing.triton_kernels import ARCHITECTURES, Compiled, KernelCase

FP8_ARCHITECTURES = (90, 100)
"""Triton has no FP8 products for sm_80."""
TENSOR_CORES = ("mma", "wgmma", "tcgen05")
SMS = 132
TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int8": "i8",
    "float8_e4m3fn": "fp8e4nv",
}
KINDS = {"uint4": "uint4", "int8": "int8", "float8_e4m3fn": "float8"}


def case(
    name: str,
    kernel: str,
    given: dict[str, str],
    constants: dict[str, Any],
    *how: int,
    **expected: Any,
) -> KernelCase:
    if " 1 rows" in name:  # Triton specializes the value 1
        given.pop("num_rows")
        constants["num_rows"] = 1
    left = {k: v for k, v in constants.items() if k not in given}
    return KernelCase(name, f"dovetail_matmul_cuda.kernels:{kernel}", given, left, *how, **expected)


def words(
    format: WeightFormat, rows: int, dtype: str = "bfloat16", max_spilled_bytes: int = 0
) -> KernelCase:
    outs = ins = 4096
    at, itemsize = layout.geometry(format, ins), 4 if dtype == "float32" else 2
    how = by_rule(Case.of(format, outs, ins, rows), ("words",), SMS, itemsize)
    is_rounded = format.inputs is not None
    given = {
        "x": "*bf16" if is_rounded else f"*{TYPES[dtype]}",
        "words": "*i32",
        "scales": "*fp32",
        "bias": f"*{TYPES[dtype]}",
        "out": "*fp32" if how.split_k > 1 else f"*{TYPES[dtype]}",
        "num_rows": "i32",
        "num_outs": "i32:16",
        "x_row": "i32:16",
        "out_row": "i32:16",
        **({"zeros": "*u8"} if format.zeros else {}),
        **({"x_scales": "*fp32"} if is_rounded else {}),
    }
    constants = {
        "zeros": None,
        "x_scales": None,
        "IN": ins,
        "GROUP": at.group,
        "PADDED": at.padded,
        "KIND": KINDS[format.codes],
        "NUM_CHUNKS": at.num_places // layout.ROWS // layout.planes(format),
        "HAS_ZEROS": format.zeros,
        "IN_GROUPS": at.num_groups > 1,
        "HAS_X_SCALES": is_rounded,
        "HAS_BIAS": True,
        "BLOCK_M": how.block_m,
        "BLOCK_N": how.block_n,
        "SPLIT_K": how.split_k,
        "COMPUTE": f"tl.{'bfloat16' if is_rounded else dtype}",
        "INTERPRETED": False,
    }
    return case(
        f"words: {format}, {rows} rows, {dtype}",
        "multiply_words",
        given,
        constants,
        how.num_warps,
        how.num_stages,
        max_spilled_bytes=max_spilled_bytes,
        products=() if dtype == "float32" else TENSOR_CORES,
    )


def codes(format: WeightFormat, rows: int) -> KernelCase:
    outs = ins = 4096
    at = layout.geometry(format, ins)
    how = by_rule(Case.of(format, outs, ins, rows), ("codes",), SMS, 2)
    given = {
        "x": f"*{TYPES[format.codes]}",
        "codes": f"*{TYPES[format.codes]}",
        "scales": "*fp32",
        "x_scales": "*fp32",
        "bias": "*bf16",
        "out": "*fp32" if how.split_k > 1 else "*bf16",
        "num_rows": "i32",
        "num_outs": "i32:16",
        "x_row": "i32:16",
        "out_row": "i32:16",
    }
    constants = {
        "IN": ins,
        "GROUP": at.group,
        "PADDED": at.padded,
        "NUM_PLACES": at.num_places,
        "IN_GROUPS": at.num_groups > 1,
        "HAS_BIAS": True,
        "BLOCK_M": how.block_m,
        "BLOCK_N": how.block_n,
        "BLOCK_K": min(how.block_k, at.padded),
        "SPLIT_K": how.split_k,
        "INTERPRETED": False,
    }
    return case(
        f"codes: {format}, {rows} rows",
        "multiply_codes",
        given,
        constants,
        how.num_warps,
        how.num_stages,
        architectures=FP8_ARCHITECTURES if format.codes == "float8_e4m3fn" else ARCHITECTURES,
        products=TENSOR_CORES,
    )


def rounding(kind: str, as_float: bool) -> KernelCase:
    stored = "*bf16" if as_float else "*i8" if kind == "int8" else "*u8"
    given = {"x": "*bf16", "codes": stored, "scales": "*fp32", "num_rows": "i32", "x_row": "i32:16"}
    constants = {
        "fixed": None,
        "IN": 14336,
        "BLOCK_M": 1,
        "BLOCK": 16384,
        "KIND": kind,
        "HAS_FIXED": False,
    }
    constants["AS_FLOAT"] = as_float
    return case(
        f"round_rows: {kind}{' as numbers' * as_float}",
        "round_rows",
        given,
        constants,
        8,
        3,
        divides_exactly=True,
    )


def others() -> list[KernelCase]:
    given = {
        "parts": "*fp32",
        "x_scales": "*fp32",
        "bias": "*bf16",
        "out": "*bf16",
        "num_rows": "i32",
        "num_outs": "i32:16",
    }
    constants = {
        "HAS_X_SCALES": True,
        "HAS_BIAS": True,
        "SPLIT_K": 8,
        "BLOCK": 256,
        "INTERPRETED": False,
    }
    found = [case("add_up", "add_up", given, constants, 2, 3)]
    given = {"words": "*i32", "scales": "*fp32", "zeros": "*u8", "out": "*bf16"}
    given |= dict.fromkeys(("num_outs", "width", "first"), "i32:16")
    constants = {
        "IN": 4096,
        "GROUP": 128,
        "PADDED": 128,
        "KIND": "uint4",
        "HAS_ZEROS": True,
        "BLOCK_N": 128,
        "COMPUTE": "tl.bfloat16",
        "INTERPRETED": False,
    }
    return [*found, case("expand_words", "expand_words", given, constants, 4, 3)]


def fp8(group: int | None) -> WeightFormat:
    return WeightFormat("float8_e4m3fn", group, inputs="float8_e4m3fn")


GPTQ, AWQ = WeightFormat("uint4", 128), WeightFormat("uint4", 128, zeros=True)
ONE_ROW = words(GPTQ, 1)
CASES = [
    # Formats of common models.
    ONE_ROW,
    words(GPTQ, 32),
    words(GPTQ, 128),
    words(AWQ, 1, "float16"),
    words(AWQ, 64),
    words(WeightFormat("int8"), 1),
    words(WeightFormat("float8_e4m3fn", 128), 1),
    codes(WeightFormat("int8", inputs="int8"), 1),
    codes(WeightFormat("int8", inputs="int8"), 4096),
    codes(fp8(128), 64),
    codes(fp8(128), 4096),
    rounding("int8", False),
    rounding("float8", False),
    rounding("float8", True),
    *others(),
    # Other formats.
    words(GPTQ, 5, "float32"),
    words(WeightFormat("int8", 100, zeros=True), 5, "float16"),
    words(WeightFormat("uint4", 48), 40, max_spilled_bytes=24),
    words(WeightFormat("uint4", inputs="float8_e4m3fn"), 5),
]


def check(rows: Sequence[Compiled]) -> None:
    """Check that, for products of one row on Hopper, words and inputs are prefetched to shared
    memory, and that words are loaded from there to registers. Dequantized weights are never in
    shared memory."""
    found = [row for row in rows if row.architecture == 90 and row.name == ONE_ROW.name]
    assert found
    words_and_inputs = 64 * 16 * 4 + 8 * 16 * 16 * 2
    ahead = words_and_inputs * (ONE_ROW.num_stages - 1)
    for row in found:
        assert ahead <= row.shared_bytes <= ahead + 16 * 64 * 4
