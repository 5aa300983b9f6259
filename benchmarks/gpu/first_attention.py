"""Attention on one layer of the 8B shape: as it is launched now, beside its bounds, FlashInfer and
PyTorch; then launched in other ways, to find the ones that read fastest."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import part_attention
import providers
import torch
from part_attention import Case, decode_of, step_of, torch_decode, torch_prefill
from rows import DRY, Row, Rows, captured, copy_bandwidth, matrix_rate, seconds

DECODE = ((2, 50),) if DRY else ((32, 4096), (1, 32768), (256, 1024))
"""Rows, and tokens of each."""
PREFILL = 40 if DRY else 8192
STAGES = (2,) if DRY else (2, 3, 5)
PROGRAMS = (2,) if DRY else (2, 3, 4)
LONG_PROGRAMS = (1,) if DRY else (1, 2)
BLOCKS = (32,) if DRY else (64, 32, 128)


@dataclass(frozen=True)
class Way:
    """How the Triton kernels are launched."""

    num_stages: int
    block_n: int
    programs: int
    """For each multiprocessor."""

    def __str__(self) -> str:
        return f"{self.num_stages} stages, {self.block_n} keys, {self.programs} programs"


@contextlib.contextmanager
def launched(way: Way) -> Iterator[None]:
    """Within it, Triton attention is launched in this way. The only place that knows how the plugin
    chooses: the names are replaced in its modules, and none of them is part of a contract. Raises
    `AttributeError` if they are no longer there."""
    names = [f"dovetail_attention_cuda.{module}" for module in ("shapes", "backend")]
    modules = [importlib.import_module(name) for name in names]
    choose = modules[0].launch

    def launch(*arguments: Any, **more: Any) -> Any:
        return replace(choose(*arguments, **more), num_stages=way.num_stages, block_n=way.block_n)

    values = {"launch": launch, "SHORT_PROGRAMS": way.programs, "LONG_PROGRAMS": way.programs}
    before = [
        (module, name, getattr(module, name))
        for module in modules
        for name in values
        if hasattr(module, name)
    ]
    if missing := set(values) - {name for module, name, _ in before if module is modules[1]}:
        raise AttributeError(f"dovetail_attention_cuda.backend has no {', '.join(sorted(missing))}")
    try:
        for module, name, _ in before:
            setattr(module, name, values[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def run(rows: Rows) -> None:
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    rows.add(Row("device copy, read and written", bandwidth / 1e9, "GB/s"))
    rows.add(Row("bfloat16 matrix product", rate / 1e12, "TFLOP/s"))
    backends = part_attention.usable(rows)
    for batch, context in DECODE:
        for name, (backend, can) in backends.items():
            for kv_dtype in ("bfloat16", "float8_e4m3fn", "int8")[: 1 if DRY else 3]:
                if kv_dtype in can.kv_dtypes:
                    what = f"decode, {batch} rows of {context}: {name}, {kv_dtype}"
                    case = Case([context - 1] * batch, [1] * batch, kv_dtype)
                    rows.attempt(
                        what, decode_of, rows, what, backend, case, bandwidth, {}, name, seconds=40
                    )
        what = f"decode, {batch} rows of {context}: torch"
        rows.attempt(
            what,
            lambda b=batch, c=context, w=what: rows.add(Row(w, torch_decode(b, c) * 1e6, "µs")),
        )
    for name, (backend, _) in backends.items():
        if name != "cuda":  # which is slow at it by design
            what = f"prefill of {PREFILL}: {name}"
            rows.attempt(
                what, prefill_of, rows, what, backend, Case([0], [PREFILL]), rate, seconds=40
            )
    rows.attempt(
        "torch prefill",
        lambda: rows.add(Row(f"prefill of {PREFILL}: torch", torch_prefill(PREFILL) * 1e6, "µs")),
        seconds=30,
    )
    if "triton" in backends:
        sweep(rows, bandwidth, rate)


def prefill_of(rows: Rows, what: str, backend: Any, case: Case, rate: float) -> None:
    step = step_of(case, backend)
    taken = seconds(lambda: backend.run(*step), rounds=3)
    achieved = f"bf16 GEMM; {case.operations / taken / 1e12:.0f} TFLOP/s"
    rows.add(Row(what, taken * 1e6, "µs", achieved, case.operations / taken / rate))


def sweep(rows: Rows, bandwidth: float, rate: float) -> None:
    """All ways on all shapes, and FP8 on the first one."""
    if not rows.attempt("sweep: set how kernels are launched", try_launched, is_needed=True):
        return
    cases: list[tuple[str, Case, Callable[[], Iterator[tuple[int, int, int]]]]] = [
        (
            f"decode, {batch} rows of {context}",
            Case([context - 1] * batch, [1] * batch),
            lambda: itertools.product(BLOCKS, STAGES, PROGRAMS),
        )
        for batch, context in DECODE
    ]
    cases.insert(
        1,
        (
            f"prefill of {PREFILL}",
            Case([0], [PREFILL]),
            lambda: itertools.product(BLOCKS, STAGES, LONG_PROGRAMS),
        ),
    )
    if not DRY:
        cases.append(
            (
                f"{cases[0][0]}, float8_e4m3fn",
                replace(cases[0][1], kv_dtype="float8_e4m3fn"),
                cases[0][2],
            )
        )
    for what, case, ways in cases:
        best: dict[str, float] = {}
        for block_n, num_stages, programs in ways():
            way = Way(num_stages, block_n, programs)
            label = f"sweep, {what}: {way}"
            rows.attempt(label, one_way, rows, label, way, case, bandwidth, rate, best, seconds=30)
        if best:
            way_name = min(best, key=lambda name: best[name])
            rows.add(Row(f"best of the sweep, {what}: {way_name}", best[way_name] * 1e6, "µs"))


def try_launched() -> None:
    with launched(Way(2, 64, 2)):
        shapes = importlib.import_module("dovetail_attention_cuda.shapes")
        found = shapes.launch(16, 128, 2, 2)
    if (found.num_stages, found.block_n) != (2, 64):
        raise RuntimeError(f"{found} in place of 2 stages of 64 keys")


REFERENCES: dict[str, torch.Tensor] = {}
"""Outputs as the plugin launches its kernels, by case."""


def one_way(
    rows: Rows,
    what: str,
    way: Way,
    case: Case,
    bandwidth: float,
    rate: float,
    best: dict[str, float],
) -> None:
    provider = providers.usable("attention")["triton"]
    key = str(case)
    if key not in REFERENCES:
        REFERENCES[key] = output(case, providers.build(provider))[0]
    with launched(way):
        backend = providers.build(provider)  # a new one: plans are kept by the number of programs
        out, step = output(case, backend)
        difference = float((out - REFERENCES[key]).abs().max())
        is_decode = max(case.new) == 1
        run = captured(lambda: backend.run(*step)) if is_decode else lambda: backend.run(*step)
        taken = seconds(run, rounds=3, least=0.03)
    ratio = case.kv_bytes / taken / bandwidth if is_decode else case.operations / taken / rate
    beside = f"{'copy' if is_decode else 'bf16 GEMM'}; largest difference {difference:.2g}"
    rows.add(Row(what, taken * 1e6, "µs", beside, ratio))
    if difference > 0.1:
        raise AssertionError(
            f"the output differs by {difference:.3g} from the one of the plugin's own launch"
        )
    best[str(way)] = taken


def output(case: Case, backend: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """What a step gives for the same random numbers each time."""
    torch.manual_seed(0)
    step = step_of(case, backend)
    backend.run(*step)
    return step[-1].float().clone(), step
