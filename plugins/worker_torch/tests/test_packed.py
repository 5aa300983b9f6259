"""Packed linear layers against float64, for every instruction set that can be had here; AMX is
emulated where it is not."""

from __future__ import annotations

import gc
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dovetail.facts import device_facts
from dovetail.interfaces.quantization import Part
from dovetail.native import build_library, cache_folder
from dovetail_worker_torch.loading.packed import PackedLinear
from dovetail_worker_torch.native import SOURCES, Kernels

BUILDS = {
    "native": {},
    "native, own threads": {"own_threads": True},
    "avx2": {"target": "avx2"},
    "amx, emulated": {"defines": ("DOVETAIL_EMULATE_AMX",)},
}


@pytest.fixture(scope="module", params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if "amx" in request.param and "avx512_bf16" not in device_facts().cpu_flags:
        pytest.skip("packs pairs of bfloat16, as CPUs with AMX do, which all have AVX-512 BF16")
    return Kernels.load(device_facts(), **BUILDS[request.param])


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def make(
    kernels: Kernels, weight: Tensor, bias: Tensor | None = None, parts: int = 1
) -> PackedLinear:
    """Loaded part by part, as a fused layer is."""
    pieces = weight.tensor_split(parts)
    named = [Part(f"part{i}", len(piece)) for i, piece in enumerate(pieces)]
    linear = PackedLinear(kernels, named, weight.shape[1], bias is not None, weight.dtype)
    targets = linear.targets()
    for i, piece in enumerate(pieces):
        assert targets[f"part{i}.weight"].shape == piece.shape
        targets[f"part{i}.weight"].store(piece)
    for i, piece in enumerate(() if bias is None else bias.tensor_split(parts)):
        targets[f"part{i}.bias"].store(piece)
    return linear


def check(
    linear: PackedLinear, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = linear(x, dtype)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    allowed = size * (1e-5 if dtype is torch.float32 else 8e-3) + 1e-30
    assert out.dtype is dtype
    assert ((out.double() - exact).abs() <= allowed).all()
    return out


def test_the_kernels_compile_for_amx(tmp_path: Path) -> None:
    """Where it cannot run, its arithmetic is tested by emulation; this is the rest."""
    facts = device_facts()
    known = subprocess.run(
        [str(facts.compiler), "-march=sapphirerapids", "-E", "-xc++", "/dev/null"],
        capture_output=True,
    )
    if known.returncode != 0:
        pytest.skip("this compiler does not know AMX")
    build_library("worker-torch", SOURCES, facts, target="amx", folder=tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.integers(0, 40), st.integers(41, 500)),
    outputs=st.integers(1, 300),
    depth=st.integers(1, 700),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    out=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
    parts=st.integers(1, 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_every_shape(
    kernels: Kernels,
    rows: int,
    outputs: int,
    depth: int,
    dtype: torch.dtype,
    out: torch.dtype,
    biased: bool,
    parts: int,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(outputs, depth).to(dtype), torch.randn(rows, depth).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    linear = make(kernels, weight, bias, parts)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(linear, x, weight, bias, out)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_does_not_depend_on_the_other_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    depth, outputs = random.randrange(600, 1400), random.randrange(100, 300)
    weight, x = torch.randn(outputs, depth).to(dtype), torch.randn(300, depth).to(dtype)
    linear = make(kernels, weight)
    together = linear(x, torch.float32)
    for count in (1, 2, 5, 6, 7, 16, 17, 31, 32, 33, 64, 193):
        start = random.randrange(300 - count)
        assert torch.equal(
            linear(x[start : start + count], torch.float32), together[start : start + count]
        ), count


def test_nothing_is_read_behind_a_row_and_nothing_written_behind_an_output(
    kernels: Kernels,
) -> None:
    weight = torch.randn(70, 64).bfloat16()
    wide = torch.full((9, 96), torch.nan, dtype=torch.bfloat16)
    wide[:, :64] = torch.randn(9, 64)
    linear = make(kernels, weight)
    check(linear, wide[:, :64], weight, None, torch.float32)
    y = torch.full((9, 80), 7.0)
    compiled = linear.compile(wide[:, :64], y[:, :70])
    assert len(compiled.ops) == 1
    linear(wide[:, :64])
    assert (y == 7).all()


def test_nan_comes_through(kernels: Kernels) -> None:
    x = torch.ones(3, 64)
    x[1, 5] = torch.nan
    out = make(kernels, torch.ones(5, 64))(x)
    assert out.isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_weight(kernels: Kernels, dtype: torch.dtype) -> None:
    weight = torch.randn(131, 50).to(dtype)
    ids = torch.tensor([130, 0, 64, 63, 5, 5])
    assert torch.equal(make(kernels, weight).rows(ids), weight[ids])


def test_weights_of_another_type_are_converted(kernels: Kernels) -> None:
    weight = torch.randn(20, 40)
    linear = PackedLinear(kernels, [Part("w", 20)], 40, False, torch.bfloat16)
    linear.targets()["w.weight"].store(weight)
    assert torch.equal(linear.rows(torch.arange(20)), weight.bfloat16())


def team_threads() -> int:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            names.append((task / "comm").read_text())
    return names.count("dovetail-team\n")


def test_own_threads_end_with_close_and_with_the_kernels(three_threads: None) -> None:
    def has_threads(more: int) -> bool:
        deadline = time.monotonic() + 20  # the system shows a thread for a moment after its end
        while team_threads() != before + more and time.monotonic() < deadline:
            time.sleep(0.001)
        return team_threads() == before + more

    weight, x = torch.randn(300, 64), torch.randn(5, 64)
    gc.collect()  # kernels of other tests
    before = team_threads()
    kernels = Kernels.load(device_facts(), own_threads=True)
    linear = make(kernels, weight)
    assert has_threads(0)
    found = linear(x)
    assert has_threads(2)
    kernels.close()
    kernels.close()
    assert has_threads(0)
    assert torch.equal(linear(x), found)
    assert has_threads(2)
    del kernels, linear
    gc.collect()
    assert has_threads(0)
    assert torch.equal(make(Kernels.load(device_facts()), weight)(x), found)
    assert has_threads(0)


def test_the_library_is_built_once(kernels: Kernels) -> None:
    assert list(cache_folder("worker-torch").glob("*.so"))
    assert kernels.instruction_set in ("AMX", "AVX-512 with BF16", "AVX-512", "AVX2")
