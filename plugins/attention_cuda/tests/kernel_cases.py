"""The cases for which tests/test_triton_kernels.py of the repository compiles the Triton kernels.

The first case of each kernel is the one that `make test` compiles.
"""

from __future__ import annotations

from collections.abc import Sequence

from dovetail_attention_cuda.shapes import launch, long_rows, power_of_two, short_rows
from dovetail_testing.triton_kernels import ARCHITECTURES, Compiled, KernelCase

FP8_ARCHITECTURES = (90, 100)
"""Triton has no FP8 arithmetic for sm_80."""
I32 = ("table", "query_start", "seq_lens", "work", "num_work")
F32 = ("partial_sum", "partial_top", "partial_weight")
STRIDES = ("q_token", "q_head", "out_token", "out_head", "cache_block", "cache_head")
SPILLED = {
    # Triton 3.6.0 spills on sm_100 to stay within 128 registers.
    "decode 4:1 × 128 fp8e4nv blocks of 16": 4,
    "prefill 2:1 × 256 bf16 blocks of 16 cap window": 172,
    "prefill 7:1 × 96 bf16 blocks of 16": 76,
}
"""Maximum number of bytes that a thread spills, by case. Other cases must not spill."""
BYTES = {"bf16": 2, "fp16": 2, "fp8e4nv": 1, "i8": 1}


def attend(
    what: str, group: int, head_size: int, kv: str = "bf16", block_size: int = 16, **has: bool
) -> KernelCase:
    block_m = short_rows(group) if what == "decode" else long_rows(group, head_size)
    how = launch(block_m, head_size, 2, BYTES[kv])
    scaled = BYTES[kv] == 1
    signature = {
        "q": "*bf16",
        "out": "*bf16",
        "k_cache": f"*{kv}",
        "v_cache": f"*{kv}",
        **dict.fromkeys(I32, "*i32"),
        **dict.fromkeys(F32, "*fp32"),
        "scale": "fp32",
        "soft_cap": "fp32",
        "window": "i32",
        **dict.fromkeys(STRIDES, "i32:16"),
        "table_row": "i32",
    }
    if has.get("HAS_SINKS"):
        signature["sinks"] = "*fp32"
    if scaled:
        signature["kv_scales"] = "*fp32"
    flags = {"HAS_CAP": False, "HAS_WINDOW": False, "HAS_SINKS": False, "HAS_SCALES": scaled} | has
    constants = {
        "KV_HEADS": 8,
        "GROUP": group,
        "D": head_size,
        "BLOCK_D": power_of_two(head_size),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": block_m,
        "BLOCK_N": how.block_n,
        **flags,
        "COMPUTE": "tl.bfloat16",
        "INTERPRETED": False,
        "sinks": None,
        "kv_scales": None,
    }
    extras = "".join(f" {name[4:].lower()}" for name, value in has.items() if value)
    name = f"{what} {group}:1 × {head_size} {kv} blocks of {block_size}{extras}"
    return KernelCase(
        name,
        "dovetail_attention_cuda.kernels:attend",
        signature,
        {k: v for k, v in constants.items() if k not in signature},
        how.num_warps,
        how.num_stages,
        FP8_ARCHITECTURES if kv == "fp8e4nv" else ARCHITECTURES,
        SPILLED.get(name, 0),
        ("mma", "wgmma", "tcgen05"),
    )


def write_kv(kv: str) -> KernelCase:
    """Return the case of writing 8 heads of size 128 to a cache of type `kv`."""
    kind = {"i8": "int8", "fp8e4nv": "float8"}.get(kv, "float")
    signature = {
        "k": "*bf16",
        "v": "*bf16",
        "k_cache": f"*{kv}",
        "v_cache": f"*{kv}",
        "slots": "*i64",
        **dict.fromkeys(
            ("k_token", "k_head", "v_token", "v_head", "cache_block", "cache_head"), "i32:16"
        ),
    }
    constants = {
        "BLOCK_SIZE": 16,
        "HEADS": 8,
        "D": 128,
        "WIDTH": 1024,
        "KIND": kind,
        "HAS_SCALES": kind != "float",
        "INTERPRETED": False,
    }
    if kind == "float":
        constants["kv_scales"] = None
    else:
        signature["kv_scales"] = "*fp32"
    architectures = FP8_ARCHITECTURES if kv == "fp8e4nv" else ARCHITECTURES
    return KernelCase(
        f"write {kv}",
        "dovetail_attention_cuda.kernels:write_kv",
        signature,
        constants,
        architectures=architectures,
        divides_exactly=True,
    )


def merge(group: int, head_size: int, **has: bool) -> KernelCase:
    flags = {"HAS_SINKS": False, "HAS_SCALES": False} | has
    signature = {
        "out": "*bf16",
        **dict.fromkeys(("query_start", "tiles"), "*i32"),
        **dict.fromkeys(F32, "*fp32"),
        "out_token": "i32:16",
        "out_head": "i32:16",
    }
    constants = {
        "KV_HEADS": 8,
        "GROUP": group,
        "D": head_size,
        "BLOCK_D": power_of_two(head_size),
        "BLOCK_M": short_rows(group),
        **flags,
        "INTERPRETED": False,
    }
    for flag, name in (("HAS_SINKS", "sinks"), ("HAS_SCALES", "kv_scales")):
        if flags[flag]:
            signature[name] = "*fp32"
        else:
            constants[name] = None
    extras = "".join(f" {name[4:].lower()}" for name, value in has.items() if value)
    return KernelCase(
        f"merge {group}:1 × {head_size}{extras}",
        "dovetail_attention_cuda.kernels:merge",
        signature,
        constants,
    )


CASES = [
    # Geometries of common models.
    *(
        attend(what, group, head_size, kv)
        for what in ("decode", "prefill")
        for group, head_size, kv in (
            (4, 128, "bf16"),
            (4, 128, "fp8e4nv"),
            (4, 128, "i8"),
            (8, 64, "bf16"),
            (8, 128, "bf16"),
        )
    ),
    # Other geometries and features.
    attend("decode", 1, 256, HAS_CAP=True, HAS_WINDOW=True),
    attend("prefill", 2, 256, HAS_CAP=True, HAS_WINDOW=True),
    attend("decode", 8, 64, "bf16", 128, HAS_SINKS=True, HAS_WINDOW=True),
    attend("prefill", 8, 64, "bf16", 8, HAS_SINKS=True, HAS_WINDOW=True),
    attend("decode", 7, 80),
    attend("prefill", 7, 96),
    *(write_kv(kv) for kv in ("i8", "fp8e4nv", "bf16")),
    merge(4, 128),
    merge(8, 64, HAS_SINKS=True),
    merge(4, 128, HAS_SCALES=True),
    merge(1, 256),
]


def check(rows: Sequence[Compiled]) -> None:
    """Check that prefill uses `wgmma` on Hopper."""
    prefill = [row for row in rows if row.architecture == 90 and row.name.startswith("prefill")]
    assert prefill
    assert [row.name for row in prefill if row.products != "wgmma"] == []
