"""What it costs a step that every part is a plugin: a composed engine beside the same objects,
wired by hand.

    python benchmarks/plugin_tax.py [--sequences 1 64] [--steps 200] [--rounds 9] [--json FILE]

By hand: each class imported and called, with no registry, no hook, no selection, no attestation.
Two engines of each kind, made in the order composed, by hand, by hand, composed, decode in one
process and take turns round by round; the figures are medians over a round's steps, and then over
rounds. `noise` is what two engines of one kind differ by, which is where their memory happens to
lie: a tax below it was not seen. The tax is all of the host's, so it is taken from the step's parts
around the worker's `submit` as well (`around`), where the computation's own noise is not.
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
from dovetail.engine.engine import Engine
from dovetail.engine.kv_cache import PagedKVCache
from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs
from dovetail.interfaces.clock import SystemClock
from dovetail.plugin.build_context import BuildContext
from dovetail_attention_cpu import load_kernel
from dovetail_attention_cpu.backend import CpuAttention
from dovetail_bench.machine import machine
from dovetail_models_torch.decoder import DecoderArchitecture
from dovetail_prefix_cache.eviction import LeastRecentlyUsed
from dovetail_prefix_cache.index import HashIndex
from dovetail_worker_torch import WorkerOptions
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
    kv = PagedKVCache(groups, num_blocks, index)
    scheduler = TokenBudgetScheduler(kv, fcfs, **plan.choices["scheduler"].options)
    return Engine(scheduler, kv, worker, clock=SystemClock(), max_num_waiting=plan.max_num_waiting)


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
                rounds: list[list[tuple[float, float]]] = [[] for _ in engines]
                for i in range(args.rounds + 1):
                    for at in range(4) if i % 2 else (3, 2, 1, 0):
                        rounds[at].append(step_time(llm, engines[at], count, args.steps))
                step, around = (
                    tax([[t[part] for t in times[1:]] for times in rounds]) for part in (0, 1)
                )
                share = around["tax"] / step["by hand"]
                results.append({"sequences": count, "step": step, "around": around, "share": share})
                print(
                    f"{count:3d} sequences: composed {step['composed']:.1f} µs a step, by hand"
                    f" {step['by hand']:.1f}; tax {step['tax']:+.2f} (noise {step['noise']:.2f}),"
                    f" around the worker {around['tax']:+.2f} µs (noise {around['noise']:.2f}):"
                    f" {share:+.2%} of the step"
                )
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": "python " + " ".join(sys.argv),
        }
        args.json.write_text(
            json.dumps({"about": about, "µs": results}, indent=1, ensure_ascii=False) + "\n"
        )


def tax(rounds: list[list[float]]) -> dict[str, float]:
    """Of the rounds of four engines: composed, by hand, by hand, composed."""
    a, b, c, d = (statistics.median(times) for times in rounds)
    noise = (abs(a - d) + abs(b - c)) / 2
    return {
        "composed": (a + d) / 2,
        "by hand": (b + c) / 2,
        "tax": (a + d - b - c) / 2,
        "noise": noise,
    }


def composed() -> LLM:
    return LLM(folder_of("c"), device="cpu", overlap=False, kv_cache={"memory_gb": 1})


def step_time(llm: LLM, engine: Engine, count: int, steps: int) -> tuple[float, float]:
    """Microseconds of a step in which `count` sequences decode, and of its parts around the
    worker's `submit`: medians."""
    params = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True)
    for i in range(count):
        engine.add(llm._maker.make(prompt(16, i), params))
    whole, around = [], []
    while engine.has_work:
        began = time.perf_counter()
        plan = engine.schedule(in_flight=False)
        assert plan is not None
        planned = time.perf_counter()
        step = engine.submit(plan)
        assert step is not None
        submitted = time.perf_counter()
        engine.finish_step(step)
        engine.take_outputs()
        ended = time.perf_counter()
        whole.append(1e6 * (ended - began))
        around.append(1e6 * (planned - began + ended - submitted))
    return statistics.median(whole[5:-5]), statistics.median(around[5:-5])


if __name__ == "__main__":
    main()
