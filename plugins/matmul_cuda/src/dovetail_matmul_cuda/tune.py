"""Implement `dovetail tune kernels`: measure candidates for each product and write the fastest to a
table (choice.py).

One process per GPU measures products. The table is written after every product, so that an
interrupted run can be resumed.
"""

from __future__ import annotations

import json
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, cast

from dovetail.errors import ConfigError
from dovetail.facts import device_facts
from dovetail.interfaces.matmul import Codes, Inputs, WeightFormat
from dovetail.interfaces.worker import Progress
from dovetail_matmul_cuda.choice import Case, Choice, Table, bucket, user_table

CODES: dict[str, Codes] = {
    "uint4": "uint4",
    "int8": "int8",
    "float8": "float8_e4m3fn",
    "fp8": "float8_e4m3fn",
}
Measured = Iterator[tuple[Case, Choice, float]]
"""Products with the fastest choice and its time in seconds, in any order."""
MeasureAll = Callable[[list[Case], str], Measured]
"""Measures products with inputs of a dtype."""


def run(args: Namespace, progress: Progress) -> int:
    cases = all_cases(
        shapes_of_model(Path(args.model)) if args.model else parse_shapes(args.shapes),
        parse_formats(args.formats),
        parse_rows(args.rows),
    )
    facts = device_facts()
    if not facts.gpus:
        raise ConfigError(
            f"no GPU found to measure on{': ' * bool(facts.gpu_trouble)}{facts.gpu_trouble}"
        )
    if len(names := sorted({gpu.name for gpu in facts.gpus})) > 1:
        raise ConfigError(
            f"the GPUs of this machine differ ({', '.join(names)}): select GPUs of one kind with"
            " CUDA_VISIBLE_DEVICES"
        )
    path = Path(args.out) if args.out else user_table(names[0])
    table = tune(
        cases,
        args.dtype,
        path,
        {"gpu": names[0]},
        lambda c, d: on_gpus(c, d, len(facts.gpus)),
        progress,
    )
    print(f"{path}: {len(table.choices)} products")
    return 0


def tune(
    cases: list[Case],
    dtype: str,
    path: Path,
    about: dict[str, Any],
    measure: MeasureAll,
    progress: Progress,
) -> Table:
    """Measure the products that the table at `path` lacks, and add them. The file is created if it
    does not exist."""
    table = Table.read(path) if path.exists() else Table()
    todo = [case for case in cases if case not in table.choices]
    done = len(cases) - len(todo)
    progress("products", done, len(cases))
    for case, choice, _ in measure(todo, dtype):
        table.choices[case] = choice
        table.write(path, about | {"dtype": dtype})
        done += 1
        progress("products", done, len(cases))
    return table


def fastest(
    candidates: list[Choice],
    seconds: Callable[[Choice], float],
    skipped: tuple[type[Exception], ...] = (MemoryError,),
) -> tuple[Choice, float]:
    """Return the fastest choice and its time, the first one if there are several. Candidates that
    raise an exception of `skipped`, because they exceed the resources of the GPU, are left out.
    Raises `ConfigError` if no candidate remains."""
    found, errors = [], []
    for choice in candidates:
        try:
            found.append((seconds(choice), choice))
        except skipped as e:
            errors.append(f"{choice}: {e}")
    if not found:
        raise ConfigError(f"no kernel could be launched; the last error is: {errors[-1]}")
    best = min(found, key=lambda pair: pair[0])
    return best[1], best[0]


def candidates(case: Case, kernels: tuple[str, ...], num_sms: int) -> list[Choice]:
    """Return the choices that are worth measuring for a product that `kernels` support."""
    found: list[Choice] = []
    if "scaled_mm" in kernels:
        found.append(Choice("scaled_mm"))
    if "dequantize" in kernels and case.rows >= 64:
        found += [
            Choice("dequantize", block_n=n)
            for n in sorted({1024, 2048, 4096, case.outs})
            if n <= case.outs
        ]
    kernel = "codes" if "codes" in kernels else "words"
    block_m = min(128, max(16, case.rows))
    for m, n in product(sorted({block_m, max(16, block_m // 2)}), (32, 64, 128, 256)):
        if (
            (m <= 32 and n > 128)
            or (m > 32 and n < 64)
            or (kernel == "words" and m > 64 and n > 128)
        ):
            continue
        programs = -(-case.rows // m) * -(-case.outs // n)
        splits = [
            s
            for s in (1, 2, 4, 8)
            if s == 1 or (programs * s <= 4 * num_sms and case.in_features >= 512 * s)
        ]
        warps = (4,) if m * n <= 64 * 64 else (8,) if m * n >= 128 * 128 else (4, 8)
        depths = (64, 128) if kernel == "codes" and m > 32 else (128,)
        shapes = product(depths, splits, warps, (3, 5) if m <= 32 else (3,))
        found += [Choice(kernel, m, n, k, split, w, stages) for k, split, w, stages in shapes]
    return found


def all_cases(
    shapes: list[tuple[int, int]], formats: list[WeightFormat], rows: list[int]
) -> list[Case]:
    return list(
        dict.fromkeys(
            Case.of(f, outs, ins, n) for f in formats for outs, ins in shapes for n in rows
        )
    )


def parse_shapes(text: str) -> list[tuple[int, int]]:
    found = []
    for one in text.split(","):
        outs, _, ins = one.strip().partition("x")
        if not (outs.isdecimal() and ins.isdecimal() and int(outs) and int(ins)):
            raise ConfigError(f"--shapes: {one!r} is not OUTPUTSxINPUTS, such as 4096x14336")
        found.append((int(outs), int(ins)))
    return found


def parse_rows(text: str) -> list[int]:
    found = []
    for one in text.split(","):
        if not one.strip().isdecimal() or not int(one):
            raise ConfigError(f"--rows: {one!r} is not a positive number of rows")
        found.append(bucket(int(one)))
    return found


def parse_formats(text: str) -> list[WeightFormat]:
    found = []
    for one in text.split(","):
        weights, _, inputs = one.strip().partition(":")
        codes, _, group = weights.partition("-")
        if (
            codes not in CODES
            or (group and not group.isdecimal())
            or inputs not in ("", "int8", "float8", "fp8")
        ):
            raise ConfigError(
                f"--formats: {one!r} is not CODES-GROUP:INPUTS, such as uint4-128, int8 or"
                " float8:float8"
            )
        rounded = cast(Inputs, CODES[inputs]) if inputs else None
        found.append(WeightFormat(CODES[codes], int(group) if group else None, inputs=rounded))
    return found


def shapes_of_model(folder: Path) -> list[tuple[int, int]]:
    """Return the shapes of a decoder's fused layers: QKV projection, attention output projection,
    gate and up projection, down projection."""
    path = folder if folder.is_file() else folder / "config.json"
    try:
        config = json.loads(path.read_text())
        hidden, inner, heads = (
            config[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads")
        )
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(
            f"--model: cannot read the shapes of linear layers from {path}: {type(e).__name__}: {e}"
        ) from e
    size = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    shapes = [
        ((heads + 2 * kv_heads) * size, hidden),
        (hidden, heads * size),
        (2 * inner, hidden),
        (hidden, inner),
    ]
    return list(dict.fromkeys(shapes))


# Measurement on GPUs.


def on_gpus(cases: list[Case], dtype: str, count: int) -> Measured:
    """Measure with one process per GPU. Products of many rows, which take longest, come first."""
    context = get_context("spawn")
    devices: SimpleQueue[int] = context.SimpleQueue()
    for index in range(count):
        devices.put(index)
    with ProcessPoolExecutor(count, context, _take_device, (devices,)) as pool:
        waiting = [
            pool.submit(_measure, case, dtype) for case in sorted(cases, key=lambda c: -c.rows)
        ]
        for future in as_completed(waiting):
            yield future.result()


def _take_device(devices: SimpleQueue[int]) -> None:
    import torch

    torch.cuda.set_device(devices.get())


def _measure(case: Case, dtype: str) -> tuple[Case, Choice, float]:
    import torch
    from triton.runtime.errors import OutOfResources

    from dovetail_matmul_cuda.matmul import Linear, TritonMatmul

    device = f"cuda:{torch.cuda.current_device()}"
    matmul = TritonMatmul.on(device)
    linear: Linear = random_linear(matmul, case, dtype, device)
    x = torch.randn(case.rows, case.in_features, device=device).to(getattr(torch, dtype))
    tried = candidates(case, linear.kernels(x.dtype), matmul.num_sms)
    out_of_resources = (OutOfResources, torch.OutOfMemoryError)
    return case, *fastest(
        tried, lambda choice: _seconds(lambda: linear.multiply(x, choice)), out_of_resources
    )


def random_linear(matmul: Any, case: Case, dtype: str, device: str) -> Any:
    import torch

    from dovetail.interfaces.quantization import LinearLayer, Part

    format = WeightFormat(
        cast(Codes, case.codes), case.group_size, inputs=cast("Inputs | None", case.inputs)
    )
    width = -(-case.in_features // 2) if format.bits == 4 else case.in_features
    codes = torch.randint(0, 120, (case.outs, width), dtype=torch.uint8, device=device)
    scales = (
        torch.rand(case.outs, format.num_groups(case.in_features), device=device) * 0.01 + 0.001
    )
    layer = LinearLayer(
        "tuned", (Part("tuned", case.outs),), case.in_features, False, dtype, device
    )
    if format.bits == 8:
        codes = codes.view(getattr(torch, case.codes))
    return matmul.linear(format, layer, {"codes": codes, "scales": scales})


def _seconds(launch: Callable[[], object], rounds: int = 5, count: int = 20) -> float:
    """Return the median time of one launch in a graph, as in a decode step, with a cold L2
    cache."""
    import torch

    launch()
    torch.cuda.synchronize()
    graph, cold = torch.cuda.CUDAGraph(), torch.empty(2**28, dtype=torch.uint8, device="cuda")
    with torch.cuda.graph(graph):
        launch()
    found = []
    for _ in range(rounds * count):
        cold.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)) / 1e3)
    return statistics.median(found)
