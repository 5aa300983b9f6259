"""attention-cpu against PyTorch's scaled_dot_product_attention, in one run, interleaved.

    python benchmarks/attention_cpu.py [--rounds 5] [--only decode] [--dtype bfloat16] [--json FILE]

SDPA reads contiguous keys and values, writes none, and is given the better of two forms:
`enable_gqa`, and one that it can be fast with (decode: a group's heads as the rows of one query;
prefill: keys and values expanded beforehand). Ours reads shuffled blocks and writes the step's keys
and values. Each call takes the next of several caches, which together exceed the last-level cache
where they can, as the layers of a model do. A cell is the median of the rounds; a ratio above 1
means that ours is faster.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dovetail.facts import device_facts
from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec
from dovetail_attention_cpu import CpuOptions, build

HEADS = [(16, 8, 128), (32, 8, 64), (4, 2, 64)]
"""Hq, Hkv, D."""
CACHE_BYTES = 128 << 20
"""What the caches of a case hold together, at least, unless that takes more than 16 of them."""
SECONDS_A_ROUND = 0.02


@dataclass(frozen=True)
class Case:
    kind: str
    num_seqs: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def num_queries(self) -> int:
        return 1 if self.kind == "decode" else self.seq_len

    @property
    def kv_elements(self) -> int:
        return 2 * self.num_seqs * self.seq_len * self.num_kv_heads * self.head_size

    @property
    def flops(self) -> float:
        pairs = self.seq_len if self.kind == "decode" else self.seq_len * (self.seq_len + 1) / 2
        return 4.0 * self.num_seqs * self.num_heads * self.head_size * pairs


def cases(only: str | None) -> list[Case]:
    found = [
        Case("decode", b, s, *heads)
        for heads in HEADS
        for b in (1, 8, 32, 64)
        for s in (128, 1024, 4096)
    ]
    found += [Case("prefill", 1, s, *heads) for heads in HEADS for s in (128, 512, 2048)]
    return [c for c in found if only in (None, c.kind)]


def ours(
    case: Case, dtype: torch.dtype, block_size: int, backend: Any, num_caches: int
) -> Callable[[], None]:
    blocks_each = -(-case.seq_len // block_size)
    num_blocks = case.num_seqs * blocks_each + 1
    order = list(range(1, num_blocks))
    random.Random(0).shuffle(order)
    table = torch.tensor(order, dtype=torch.int32).view(case.num_seqs, blocks_each)
    n = case.num_queries
    positions = torch.arange(case.seq_len - n, case.seq_len)
    slots = (
        table.long()[:, positions // block_size] * block_size + positions % block_size
    ).flatten()
    starts = list(range(0, case.num_seqs * n + 1, n))
    lengths = [case.seq_len] * case.num_seqs
    batch = AttentionBatch(
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        table,
        slots,
        starts,
        lengths,
        case.num_seqs,
        case.num_seqs * n,
        n,
        case.seq_len,
    )
    layer = AttentionLayer(
        0, case.num_heads, case.num_kv_heads, case.head_size, case.head_size**-0.5
    )
    spec = KVCacheSpec(
        num_blocks, block_size, case.num_kv_heads, case.head_size, str(dtype).removeprefix("torch.")
    )
    caches = [backend.allocate_cache(spec).fill_(0.5) for _ in range(num_caches)]
    q = torch.randn(case.num_seqs * n, case.num_heads, case.head_size, dtype=dtype)
    k, v = (
        torch.randn(case.num_seqs * n, case.num_kv_heads, case.head_size, dtype=dtype) for _ in "kv"
    )
    out = torch.empty_like(q)
    plan = backend.plan(batch, [layer], block_size)
    state = [0]

    def call() -> None:
        state[0] = (state[0] + 1) % num_caches
        backend.run(layer, q, k, v, caches[state[0]], plan, out)

    return call


def sdpa(case: Case, dtype: torch.dtype, num_caches: int, form: str) -> Callable[[], None]:
    group = case.num_heads // case.num_kv_heads
    shape = (case.num_seqs, case.num_kv_heads, case.seq_len, case.head_size)
    expand = form == "expanded" and case.kind == "prefill"
    caches = [[torch.full(shape, 0.5, dtype=dtype) for _ in "kv"] for _ in range(num_caches)]
    if expand:
        caches = [[x.repeat_interleave(group, 1) for x in pair] for pair in caches]
    q = torch.randn(case.num_seqs, case.num_heads, case.num_queries, case.head_size, dtype=dtype)
    if form == "expanded" and case.kind == "decode":
        q = q.view(case.num_seqs, case.num_kv_heads, group, case.head_size)
    gqa = form == "gqa" and group > 1
    state = [0]

    def call() -> None:
        state[0] = (state[0] + 1) % num_caches
        k, v = caches[state[0]]
        scaled_dot_product_attention(q, k, v, is_causal=case.kind == "prefill", enable_gqa=gqa)

    return call


def seconds_a_call(call: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(
    case: Case, dtype: torch.dtype, block_size: int, backend: Any, rounds: int
) -> dict[str, Any]:
    num_caches = max(1, min(16, CACHE_BYTES // (case.kv_elements * dtype.itemsize)))
    medians: dict[str, float] = {}
    contenders = {"ours": ours(case, dtype, block_size, backend, num_caches)}
    contenders |= {form: sdpa(case, dtype, num_caches, form) for form in ("gqa", "expanded")}
    repeats, times = {}, {name: [] for name in contenders}
    for name, call in contenders.items():
        seconds_a_call(call, 1)
        repeats[name] = max(1, int(SECONDS_A_ROUND / seconds_a_call(call, 2)))
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(seconds_a_call(call, repeats[name]))
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = min(medians["gqa"], medians["expanded"])
    gb = case.kv_elements * dtype.itemsize / 1e9
    return asdict(case) | {
        "ours_us": medians["ours"] * 1e6,
        "sdpa_us": best * 1e6,
        "sdpa_form": "gqa" if best == medians["gqa"] else "expanded",
        "ratio": best / medians["ours"],
        "ours_gb_s": gb / medians["ours"],
        "ours_gflop_s": case.flops / medians["ours"] / 1e9,
        "sdpa_gb_s": gb / best,
        "sdpa_gflop_s": case.flops / best / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument(
        "--max-gb", type=float, default=1.5, help="leave out cases whose keys and values take more"
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    backend = build(SimpleNamespace(device=device_facts()), CpuOptions())  # type: ignore[arg-type]
    head = (
        f"{args.dtype}, blocks of {args.block_size}, {torch.get_num_threads()} threads,"
        f" {backend.instruction_set}"
    )
    print(f"{head}, torch {torch.__version__}\n")
    print("kind      B   S     Hq/Hkv/D      ours µs    SDPA µs  SDPA/ours     ours    SDPA")
    results = []
    for case in cases(args.only):
        if case.kv_elements * dtype.itemsize > args.max_gb * 1e9:
            continue
        r = measure(case, dtype, args.block_size, backend, args.rounds)
        results.append(r)
        unit, key = ("GB/s", "gb_s") if case.kind == "decode" else ("GFLOP/s", "gflop_s")
        heads = f"{case.num_heads}/{case.num_kv_heads}/{case.head_size}"
        print(
            f"{case.kind:8}{case.num_seqs:3} {case.seq_len:5}  {heads:10} {r['ours_us']:11.1f}"
            f" {r['sdpa_us']:10.1f} {r['ratio']:9.2f}  {r[f'ours_{key}']:8.1f}"
            f" {r[f'sdpa_{key}']:7.1f} {unit}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(
                {"setting": head, "torch": torch.__version__, "results": results}, file, indent=1
            )


if __name__ == "__main__":
    main()
