"""What it costs a step that every part is a plugin: a composed engine beside the same objects, wired by hand.

    python benchmarks/plugin_tax.py [--sequences 1 64] [--steps 200] [--rounds 9] [--json FILE]

By hand: each class imported and called, with no registry, no hook, no selection, no attestation. Two engines of each kind,
made in the order composed, by hand, by hand, composed, decode in one process and take turns round by round; the figures are
medians over a round's steps, and then over rounds. `noise` is what two engines of one kind differ by, which is where their
memory happens to lie: a tax below it was not seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import folder_of, prompt

from dovetail import LLM, SamplingParams
from dovetail.bench.machine import machine
from dovetail.compose import BuildContext
from dovetail.engine import Engine
from dovetail.prefix_reuse import ReusingKVCache
from dovetail.scheduler import TokenBudgetScheduler, fcfs
from dovetail_attention_cpu import load_kernel
from dovetail_attention_cpu.backend import CpuAttention
from dovetail_prefix_cache.eviction import LeastRecentlyUsed
from dovetail_prefix_cache.index import HashIndex
from dovetail_worker_torch import WorkerOptions
from dovetail_worker_torch.decoder import DecoderArchitecture
from dovetail_worker_torch.worker import TorchWorker


@dataclass(frozen=True)
class ByHand(BuildContext):
    """What a worker asks of a composition, answered without one."""

    def capabilities(self, key: str) -> Any:
        return CAPABILITIES[key]

    def build(self, key: str, options: Any = None) -> Any:
        return {
            "architecture": DecoderArchitecture,
            "attention.full": lambda: CpuAttention(load_kernel(self.device, "native")),
            "quantization": lambda: None,
        }[key]()


CAPABILITIES: dict[str, Any] = {}


def wired_by_hand(llm: LLM) -> Engine:
    """An engine of the same parts and the same sizes as the composed one."""
    composed = llm.engine
    context = llm.engine.worker._context  # type: ignore[attr-defined]
    for key in ("architecture", "quantization"):
        CAPABILITIES[key] = context.capabilities(key)
    plan = context.plan
    by_hand = ByHand(plan, context.registry, context.device, context.model)
    worker = TorchWorker(by_hand, WorkerOptions.model_validate(plan.choices["worker"].options))
    worker.load(lambda *_: None)
    groups, num_blocks = worker.kv_groups(), composed.kv.num_blocks
    worker.allocate(num_blocks)
    worker.warm_up(lambda *_: None)
    index = HashIndex(groups[0].block_size, num_blocks, LeastRecentlyUsed)
    kv = ReusingKVCache(groups, num_blocks, index)
    scheduler = TokenBudgetScheduler(kv, fcfs, **plan.choices["scheduler"].options)
    return Engine(scheduler, kv, worker, max_num_waiting=plan.max_num_waiting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    with composed() as llm:
        engines = [llm.engine, wired_by_hand(llm), wired_by_hand(llm)]
        with composed() as other:
            engines.append(other.engine)
            for count in args.sequences:
                rounds: list[list[float]] = [[] for _ in engines]
                for i in range(args.rounds + 1):
                    for at in range(4) if i % 2 else (3, 2, 1, 0):
                        rounds[at].append(step_time(llm, engines[at], count, args.steps))
                a, b, c, d = (statistics.median(times[1:]) for times in rounds)
                tax, noise = (a + d - b - c) / 2, (abs(a - d) + abs(b - c)) / 2
                of = {"composed": (a + d) / 2, "by hand": (b + c) / 2}
                results.append({"sequences": count, **of, "tax": tax, "noise": noise, "share": tax / of["by hand"]})
                print(
                    f"{count:3d} sequences: composed {of['composed']:.1f} µs a step, by hand {of['by hand']:.1f}; "
                    f"tax {tax:+.2f} µs ({tax / of['by hand']:+.2%}); noise {noise:.2f} µs"
                )
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "command": "python " + " ".join(sys.argv)}
        args.json.write_text(json.dumps({"about": about, "µs": results}, indent=1, ensure_ascii=False) + "\n")


def composed() -> LLM:
    return LLM(folder_of("c"), device="cpu", overlap=False, kv_cache={"memory_gb": 1})


def step_time(llm: LLM, engine: Engine, count: int, steps: int) -> float:
    """Microseconds of a step in which `count` sequences decode, the median."""
    params = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True)
    for i in range(count):
        engine.add(llm._maker.make(prompt(16, i), params))
    times = []
    while engine.has_work:
        began = time.perf_counter()
        engine.step()
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times[5:-5])


if __name__ == "__main__":
    main()
