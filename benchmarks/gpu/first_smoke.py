"""Every kernel once, each in an attempt of its own, compared with a reference in float64.

A row's value is the largest error relative to the largest number of the reference. For attention,
`ratio` is the largest error relative to the error that the conformance kit allows in that element:
above 1 is wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import providers
import torch
from providers import F8
from rows import DEVICE, DRY, Row, Rows

from dovetail.interfaces.matmul import WeightFormat
from dovetail_testing.attention_steps import Row as Sequence
from dovetail_testing.attention_steps import Step, StepSpec
from dovetail_testing.attention_trial import differing_slots
from dovetail_testing.matmul import MatmulContract, Product, dequantized, rounded_inputs

KV_DTYPES = ("bfloat16", F8, "int8")
MOST_SECONDS = 30.0
"""Of an attempt, which may compile some kernels."""
LENGTHS = (40, 20) if DRY else (1000, 300)
DECODE = tuple(
    Sequence(n, 1) for n in ((LENGTHS[0], 3) if DRY else (LENGTHS[0], 17, 3000, 64, 1, 255))
)
PREFILL = (Sequence(0, LENGTHS[1]),)
MIXED = (Sequence(LENGTHS[0], 1), Sequence(0, LENGTHS[1]), Sequence(30, 7), Sequence(64, 1))
HEADS = {"num_heads": 4, "num_kv_heads": 2} if DRY else {"num_heads": 32, "num_kv_heads": 8}


def add_error(rows: Rows, what: str, got: Any, expected: Any, limit: float) -> None:
    """`limit`: the largest relative error of a correct kernel. Raises if the result is not finite
    or further off."""
    got, expected = got.double().cpu(), expected.double().cpu()
    if not bool(got.isfinite().all()):
        raise AssertionError(
            f"{int((~got.isfinite()).sum())} of {got.numel()} elements are not finite"
        )
    difference = float((got - expected).abs().max())
    relative = difference / max(float(expected.abs().max()), 1e-30)
    rows.add(
        Row(
            f"{what}: error",
            relative,
            "",
            f"largest absolute {difference:.3g}",
            relative / limit,
            1.0,
            is_most=True,
        )
    )
    if relative > limit:
        raise AssertionError(
            f"off by {difference:.4g}, {relative:.3g} of the largest number; {limit:.3g} is allowed"
        )


# Attention.


def attention(rows: Rows) -> None:
    names = providers.usable("attention")
    names.pop("torch-reference", None)
    rows.fact("usable", [*names])
    built: dict[str, tuple[Any, Any]] = {}
    for name, provider in names.items():
        rows.attempt(
            f"{name}: build",
            lambda n=name, p=provider: built.update({n: (providers.build(p), p.capabilities)}),
            is_needed=True,
        )
    for what, spec in specs().items():
        for name, (backend, can) in built.items():
            if lacks(can, spec) is None and not (DRY and name != "triton"):
                rows.attempt(
                    f"{name}: {what}",
                    attend,
                    rows,
                    f"{name}: {what}",
                    backend,
                    spec,
                    seconds=MOST_SECONDS,
                )


def specs() -> dict[str, StepSpec]:
    """Steps to try by what they are, the plainest first."""
    base = StepSpec(DECODE, "bfloat16", "bfloat16", head_size=64 if DRY else 128, seed=1, **HEADS)
    found = {f"write {kv}": replace(base, rows=(Sequence(0, 5),), kv_dtype=kv) for kv in KV_DTYPES}
    for kind, of in (("decode", DECODE), ("prefill", PREFILL), ("mixed", MIXED)):
        found |= {f"{kind} {kv}": replace(base, rows=of, kv_dtype=kv) for kv in KV_DTYPES}
    special = replace(base, rows=MIXED if not DRY else DECODE, window=50)
    found |= {
        "window": special,
        "cap": replace(special, window=None, logit_soft_cap=30.0),
        "sinks": replace(special, window=None, sinks=True),
        "window, cap and sinks": replace(special, logit_soft_cap=30.0, sinks=True),
        "large logits": replace(base, scale=4.0),
        "q, k and v in one tensor": replace(base, fused=True),
        "decode, 2 query heads to a KV head": replace(base, num_heads=2 * base.num_kv_heads),
    }
    for size in () if DRY else (64, 256):
        found |= {
            f"head size {size}, {kind}": replace(base, rows=of, head_size=size)
            for kind, of in (("decode", DECODE), ("prefill", PREFILL))
        }
    if DRY:  # one of each kind of kernel: the interpreter is slow
        kept = ("write", "decode bfloat16", "prefill int8", f"mixed {F8}", "window, cap and sinks")
        found = {name: spec for name, spec in found.items() if name.startswith(kept)}
    return found


def lacks(can: Any, spec: StepSpec) -> str | None:
    """What a provider does not declare of a step."""
    checks = {
        spec.kv_dtype: spec.kv_dtype in can.kv_dtypes,
        spec.dtype: spec.dtype in can.dtypes,
        "head size": can.head_sizes is None or spec.head_size in can.head_sizes,
        "window": spec.window is None or can.sliding_window,
        "cap": spec.logit_soft_cap is None or can.logit_soft_cap,
        "sinks": not spec.sinks or can.sinks,
    }
    return next((what for what, has in checks.items() if not has), None)


def attend(rows: Rows, what: str, backend: Any, spec: StepSpec) -> None:
    """One step from a cache that holds NaN wherever nothing may be read. Output first, then what
    was written."""
    step = Step(spec, DEVICE)
    cache, out = (
        backend.allocate_cache(step.cache_spec),
        step.q.new_full(step.q.shape, float("nan")),
    )
    backend.import_kv(cache, list(range(step.num_blocks)), *step.before.to(DEVICE))
    plan = backend.plan(step.batch(), [step.layer], spec.block_size)
    backend.run(step.layer, step.q, step.k, step.v, cache, plan, out)
    expected, allowed = step.expected()
    exported = [x.cpu() for x in backend.export_kv(cache, list(range(step.num_blocks)))]
    problems = []
    for got, after, which in zip(exported, step.after, ("keys", "values"), strict=True):
        if slots := differing_slots(got, after):
            mine = len(set(slots) & set(step.slots))
            problems.append(
                f"{which}: {len(slots)} slots differ, {mine} of them the step's own"
                f" {len(step.slots)}"
            )
    got = out.cpu().double()
    wrong = ~((got - expected).abs() <= allowed)
    largest = float((got - expected).abs().nan_to_num(nan=float("inf")).max())
    relative = largest / float(expected.abs().max())
    worst = float(((got - expected).abs() / allowed).nan_to_num(nan=float("inf")).max())
    rows.add(
        Row(
            f"{what}: error",
            relative,
            "",
            f"largest absolute {largest:.3g}",
            worst,
            1.0,
            is_most=True,
        )
    )
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        problems.append(
            f"output: {int(wrong.sum())} of {wrong.numel()} elements are wrong, the first at"
            f" {first}"
        )
    if problems:
        raise AssertionError("; ".join(problems))


# Products by quantized weights.

FORMATS = {
    "W4A16 in groups of 128": WeightFormat("uint4", 128),
    "W4A16 in groups of 128, with zeros": WeightFormat("uint4", 128, zeros=True),
    "FP8 W8A8": WeightFormat(F8, inputs=F8),
    "FP8 W8A8 in groups of 128": WeightFormat(F8, 128, inputs=F8),
    "INT8 W8A8": WeightFormat("int8", inputs="int8"),
    "INT8 W8A16": WeightFormat("int8"),
    "FP8 W8A16": WeightFormat(F8),
}
NUM_ROWS = (3,) if DRY else (1, 16, 64, 300)
OUTS, INS = (32, 128) if DRY else (1024, 2048)


def linear(rows: Rows) -> None:
    found = providers.usable("matmul", inputs=("int8", F8))
    rows.fact("usable", [*found])
    found.pop("torch", None)
    for name, provider in found.items():
        kit = type("Kit", (MatmulContract,), {"provider": provider, "device": DEVICE, "seed": 1})()
        built: list[Any] = []
        rows.attempt(
            f"{name}: build",
            lambda p=provider, b=built: b.append(providers.build(p)),
            is_needed=True,
        )
        for count in NUM_ROWS if built else ():
            for what, format in FORMATS.items():
                label, product = (
                    f"{name}: {what}, {count} rows",
                    Product(format, OUTS, INS, count, dtype="bfloat16"),
                )
                rows.attempt(
                    label, multiply, rows, label, kit, built[0], product, seconds=MOST_SECONDS
                )


def multiply(rows: Rows, what: str, kit: Any, matmul: Any, one: Product) -> None:
    _, layer, tensors = tensors_of(kit, one)
    product, x = matmul.linear(one.format, layer, tensors), kit.input(one)
    got = product(x)
    given = (
        x.double()
        if one.format.inputs is None
        else rounded_inputs(x.double(), one.format.inputs, tensors)
    )
    expected = (
        given @ dequantized(one.format, one.in_features, tensors).double().T
        + tensors["bias"].double()
    )
    add_error(rows, what, got, expected, 1e-2)
    if not torch.equal(product(x), got):
        raise AssertionError("the same input gave two results")


def tensors_of(kit: Any, one: Product) -> tuple[Any, Any, dict[str, Any]]:
    """The kit's random weights, without the provider's own form of them."""
    kept: dict[str, Any] = {}
    with swapped(
        kit,
        "new",
        lambda: type(
            "Keeps", (), {"linear": lambda self, f, layer, tensors: kept.update(tensors)}
        )(),
    ):
        made, layer, tensors = kit.made(one)
    return made, layer, tensors


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


# What stands between a decoder's products.


def decoder(rows: Rows) -> None:
    rows.attempt("norm", norm, rows)
    rows.attempt("norm of a sum", norm, rows, True)
    rows.attempt("rotation", rotation, rows, False)
    rows.attempt("rotation of normalized heads", rotation, rows, True)
    for activation in ("silu",) if DRY else ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
        rows.attempt(f"gate, {activation}", gate, rows, activation)
    rows.attempt("noise", noise, rows)
    rows.attempt("best of the logits", best, rows)
    for top_k, top_p in ((0, 0.9), (40, 1.0), (40, 0.9)):
        rows.attempt(f"top-k {top_k}, top-p {top_p}", cut, rows, top_k, top_p)


TOKENS, HIDDEN, VOCAB = (3, 128, 500) if DRY else (300, 4096, 128256)
BF16 = 2.0**-7
"""Of a result that was rounded twice, relative to the largest number."""


def of_device(*shape: int, seed: int = 0) -> Any:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        .to(torch.bfloat16)
        .to(DEVICE)
    )


def operations() -> Any:
    from dovetail_models_torch.fused import TritonOperations

    return TritonOperations()


def normalized(x: Any, eps: float) -> Any:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def norm(rows: Rows, has_delta: bool = False) -> None:
    x, delta, weight = (
        of_device(TOKENS, HIDDEN),
        of_device(TOKENS, HIDDEN, seed=1),
        of_device(HIDDEN, seed=2),
    )
    total = (x + delta).double() if has_delta else x.double()
    expected = normalized(total, 1e-5) * weight.double()
    if has_delta:
        got = operations().add_rms_norm(x, delta, weight, 1e-5)
        add_error(rows, "sum before the norm", x, total, BF16)
        add_error(rows, "norm of a sum", got, expected, BF16)
    else:
        add_error(rows, "norm", operations().rms_norm(x, weight, 1e-5), expected, BF16)


def rotation(rows: Rows, has_norm: bool) -> None:
    from dovetail_models_torch.rope import RotaryEmbedding

    num_heads, num_kv_heads, size = (4, 2, 64) if DRY else (32, 8, 128)
    qkv = of_device(TOKENS, num_heads + 2 * num_kv_heads, size)
    weight = of_device(num_heads + num_kv_heads, size, seed=1) if has_norm else None
    frequencies = 1.0 / 10000 ** (torch.arange(size // 2) / (size // 2))
    rotary = RotaryEmbedding(frequencies.to(DEVICE), 1.0, torch.bfloat16, torch.device(DEVICE))
    cos, sin = rotary(torch.arange(TOKENS, device=DEVICE) * 7)
    turning, values = (
        qkv[:, : num_heads + num_kv_heads].double(),
        qkv[:, num_heads + num_kv_heads :],
    )
    if weight is not None:
        turning = normalized(turning, 1e-6) * weight.double()
    turned = turning * cos.double() + turning.roll(size // 2, -1) * sin.double()
    got = operations().rotated(qkv, num_heads, num_kv_heads, weight, 1e-6, cos, sin)
    expected = (turned[:, :num_heads], turned[:, num_heads:], values)
    for name, one, other in zip(("queries", "keys", "values"), got, expected, strict=True):
        add_error(
            rows, f"rotation{' of normalized heads' * has_norm}, {name}", one, other, 2 * BF16
        )


def gate(rows: Rows, activation: str) -> None:
    from dovetail_models_torch.operations import ACTIVATIONS

    both = of_device(TOKENS, 2 * HIDDEN)
    expected = ACTIVATIONS[activation](both[:, :HIDDEN].double()) * both[:, HIDDEN:].double()
    add_error(rows, f"gate, {activation}", operations().gated(both, activation), expected, BF16)


def sampling() -> Any:
    from dovetail_worker_torch.sampling import triton_sampler

    return triton_sampler.TritonSampler()


def logits_of(num_rows: int) -> Any:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 3


def noise(rows: Rows) -> None:
    """Against its definition in noise.py, in float32 on the CPU."""
    import numpy as np

    from dovetail_worker_torch.sampling.noise import add_gumbel_noise_, row_keys

    logits, count = logits_of(4), np.arange(4, dtype=np.int64)
    keys = row_keys(count * 12345, count, count * 99)
    expected = add_gumbel_noise_(logits.cpu().clone(), keys)
    got = logits.clone()
    sampling().add_gumbel_noise_(got, keys)
    add_error(rows, "noise", got, expected, 1e-5)
    same = int((got.cpu().argmax(-1) == expected.argmax(-1)).sum())
    rows.add(Row("noise: equal tokens", same, "rows", "of 4", same / 4, 1.0))


def best(rows: Rows) -> None:
    logits = logits_of(4)
    logits[2, 5] = torch.nan
    tokens, usable = sampling().best(logits)
    expected = logits.cpu().double().argmax(-1).tolist()
    if usable != [True, True, False, True] or any(
        a != b for a, b, u in zip(tokens, expected, usable, strict=True) if u
    ):
        raise AssertionError(
            f"{tokens} {usable} instead of {expected}, of which the third is not usable"
        )
    rows.fact("best of the logits", "right")


def cut(rows: Rows, top_k: int, top_p: float) -> None:
    """Which tokens stay, beside a sort in float64. Rounding may move the border of top-p by a token
    or so."""
    logits = logits_of(4)
    ordered = logits.cpu().double().sort(-1, descending=True).values
    if top_k:
        ordered[:, top_k:] = -torch.inf
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    expected = ((before < top_p) & ordered.isfinite()).sum(-1)
    sampling().filter_top_k_top_p_(logits, [top_k] * 4, [top_p] * 4)
    kept = logits.isfinite().sum(-1).cpu()
    off, most = int((kept - expected).abs().max()), 3 + int(expected.max()) // 1000
    what = f"top-k {top_k}, top-p {top_p}: tokens kept beside a sort in float64"
    rows.add(
        Row(what, off, "tokens", f"kept {kept.tolist()}", float(off), float(most), is_most=True)
    )
    if off > most:
        raise AssertionError(f"{kept.tolist()} tokens are kept instead of {expected.tolist()}")
