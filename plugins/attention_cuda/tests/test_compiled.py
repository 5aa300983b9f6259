"""The Triton kernels compile for the GPUs that they are for, keep within their memories and spill nothing where it matters."""

from __future__ import annotations

import pytest

from dovetail.testing.triton_kernels import LARGEST_SHARED, KernelCase, compile_kernels, table
from dovetail_attention_cuda.shapes import launch, long_rows, power_of_two, short_rows

I32 = ("table", "query_start", "seq_lens", "work", "num_work")
F32 = ("partial_sum", "partial_top", "partial_weight")
STRIDES = ("q_token", "q_head", "out_token", "out_head", "cache_block", "cache_head")
BYTES = {"bf16": 2, "fp16": 2, "fp8e4nv": 1, "i8": 1}


def attend(what: str, group: int, head_size: int, kv: str = "bf16", block_size: int = 16, **has: bool) -> KernelCase:
    block_m = short_rows(group) if what == "decode" else long_rows(group, head_size)
    how = launch(block_m, head_size, 2, BYTES[kv])
    scaled = BYTES[kv] == 1
    signature = {
        "q": "*bf16", "out": "*bf16", "k_cache": f"*{kv}", "v_cache": f"*{kv}", **dict.fromkeys(I32, "*i32"),
        **dict.fromkeys(F32, "*fp32"), "scale": "fp32", "soft_cap": "fp32", "window": "i32", **dict.fromkeys(STRIDES, "i32:16"),
        "table_row": "i32",
    }  # fmt: skip
    if has.get("HAS_SINKS"):
        signature["sinks"] = "*fp32"
    if scaled:
        signature["kv_scales"] = "*fp32"
    flags = {"HAS_CAP": False, "HAS_WINDOW": False, "HAS_SINKS": False, "HAS_SCALES": scaled} | has
    constants = {
        "KV_HEADS": 8, "GROUP": group, "D": head_size, "BLOCK_D": power_of_two(head_size), "BLOCK_SIZE": block_size,
        "BLOCK_M": block_m, "BLOCK_N": how.block_n, **flags, "COMPUTE": "tl.bfloat16", "INTERPRETED": False,
        "sinks": None, "kv_scales": None,
    }  # fmt: skip
    extras = "".join(f" {name[4:].lower()}" for name, value in has.items() if value)
    name = f"{what} {group}:1 × {head_size} {kv} blocks of {block_size}{extras}"
    return KernelCase(
        name, "dovetail_attention_cuda.kernels:attend", signature,
        {k: v for k, v in constants.items() if k not in signature}, how.num_warps, how.num_stages,
    )  # fmt: skip


TUNED = [
    attend(what, group, head_size, kv)
    for what in ("decode", "prefill")
    for group, head_size, kv in ((4, 128, "bf16"), (4, 128, "fp8e4nv"), (4, 128, "i8"), (8, 64, "bf16"), (8, 128, "bf16"))
]
"""What models of today have."""
OTHERS = [
    attend("decode", 1, 256, HAS_CAP=True, HAS_WINDOW=True),
    attend("prefill", 2, 256, HAS_CAP=True, HAS_WINDOW=True),
    attend("decode", 8, 64, "bf16", 128, HAS_SINKS=True, HAS_WINDOW=True),
    attend("prefill", 8, 64, "bf16", 8, HAS_SINKS=True, HAS_WINDOW=True),
    attend("decode", 7, 80),
    attend("prefill", 7, 96),
]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_attend(architecture, capsys):
    """On sm_80 without FP8, which Triton has no arithmetic for there."""
    tuned = [case for case in TUNED if architecture > 80 or "fp8" not in case.name]
    compiled = compile_kernels(tuned + OTHERS, [architecture])
    with capsys.disabled():
        print(f"\n{table(compiled)}")
    names = {case.name for case in tuned}
    assert [c.name for c in compiled if c.shared_bytes > LARGEST_SHARED[architecture]] == []
    assert [c.name for c in compiled if c.name in names and c.spilled_bytes] == []
    assert {c.products for c in compiled if c.name in names} <= {"mma", "wgmma", "tcgen05"}
    if architecture == 90:
        assert {c.products for c in compiled if c.name.startswith("prefill")} == {"wgmma"}
