"""The compiled kernel fulfils the contract, compiled for the host CPU and for AVX2 only, and keeps
its other guarantees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dovetail.errors import PluginError
from dovetail.facts import device_facts
from dovetail.interfaces.attention import KVCacheSpec
from dovetail.native import openmp_of
from dovetail_attention_cpu import CAPABILITIES, PROVIDER, load_kernel
from dovetail_attention_cpu.backend import CpuAttention
from dovetail_testing.attention import AttentionContract
from dovetail_testing.attention_steps import Row, Step, StepSpec, plain
from dovetail_testing.attention_trial import same


class TestAttentionCpu(AttentionContract):
    provider = PROVIDER


class TestAttentionCpuAvx2(AttentionContract):
    provider = PROVIDER
    options = {"target": "avx2"}  # noqa: RUF012


@pytest.fixture(scope="module")
def backend():
    return CpuAttention(load_kernel(device_facts()))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(backend, step):
    contract = TestAttentionCpu()
    contract.backend = backend
    return contract.run(step)[0]


@pytest.mark.parametrize(
    "rows", [(Row(5000, 1),), (Row(3000, 1), Row(300, 40), Row(0, 9)), (Row(0, 700),)]
)
@pytest.mark.parametrize("kv_dtype", CAPABILITIES.kv_dtypes)
def test_the_number_of_threads_changes_no_bit(backend, threads, rows, kv_dtype):
    """Keys are split over threads at fixed positions and merged in order."""
    dtype = kv_dtype if kv_dtype in CAPABILITIES.dtypes else "bfloat16"
    spec = plain(
        CAPABILITIES,
        *rows,
        dtype=dtype,
        kv_dtype=kv_dtype,
        num_heads=8,
        num_kv_heads=1,
        head_size=128,
        seed=1,
    )
    outs = []
    for n in (1, 2, 3, 16):
        threads(n)
        outs.append(run(backend, Step(spec, "cpu")))
    assert all(torch.equal(out, outs[0]) for out in outs[1:])


@pytest.mark.parametrize("num_heads", [1, 16])
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "int8"])
def test_one_byte_kv_in_batches_of_any_size(backend, kv_dtype, num_heads):
    """One-byte KV is converted once per tile for many rows and in registers for few rows. The
    results are bitwise identical."""
    spec = plain(
        CAPABILITIES,
        Row(0, 300),
        dtype="bfloat16",
        kv_dtype=kv_dtype,
        num_heads=num_heads,
        num_kv_heads=1,
        seed=9,
    )
    whole = Step(spec, "cpu")
    contract = TestAttentionCpu()
    contract.backend = backend
    out = run(backend, whole)
    for begin, end in ((0, 1), (17, 20), (255, 258), (299, 300)):
        part = contract.transplant(whole, replace(spec, rows=(Row(begin, end - begin),)), 0)
        assert torch.equal(run(backend, part), out[begin:end])


def test_nan_in_the_input_is_not_hidden(backend):
    step = Step(plain(CAPABILITIES, Row(0, 20), seed=2), "cpu")
    step.q[7, 0, 0] = float("nan")
    out = run(backend, step)
    assert out[7, 0].isnan().all()
    assert not out[6].isnan().any()


@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_goes_through_a_cache_of_float8(backend, which):
    step = Step(plain(CAPABILITIES, Row(0, 20), kv_dtype="float8_e4m3fn", seed=2), "cpu")
    getattr(step, which)[7, 0, 3] = float("nan")
    out = run(backend, step)
    assert out[7:, :2, 3].isnan().all()
    assert not out[:, 2:].isnan().any()


@pytest.mark.parametrize("scale", [1.0, 0.01, 3.0])
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "int8"])
def test_every_number_is_stored_as_the_reference_stores_it(backend, kv_dtype, scale):
    """All finite bfloat16 numbers, including subnormal numbers, ties and numbers out of range."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()].float()
    rows = torch.nn.functional.pad(every, (0, -len(every) % 256)).view(-1, 1, 256)
    spec = plain(
        CAPABILITIES,
        Row(0, len(rows)),
        kv_dtype=kv_dtype,
        num_heads=1,
        num_kv_heads=1,
        head_size=256,
        seed=3,
    )
    step = Step(spec, "cpu")
    step.keys, step.values = [rows], [-rows]
    step.layer = replace(step.layer, kv_scales=torch.tensor([scale, 2 * scale]))
    step.rebuilt()
    contract = TestAttentionCpu()
    contract.backend = backend
    _, cache = contract.run(step)
    for got, expected in zip(
        backend.export_kv(cache, list(range(step.num_blocks))), step.after, strict=True
    ):
        assert same(got, expected)


def test_large_group_of_heads(backend):
    """There are more query heads per KV head than a tile has rows."""
    contract = TestAttentionCpu()
    contract.backend = backend
    contract.check(
        plain(CAPABILITIES, Row(0, 20), Row(300, 1), num_heads=128, num_kv_heads=1, seed=3)
    )


def test_the_workspace_only_grows(backend):
    small, large = (
        Step(plain(CAPABILITIES, row, seed=4), "cpu") for row in (Row(10, 1), Row(0, 200))
    )
    run(backend, large)
    workspace = backend._workspace.data_ptr()
    run(backend, small)
    run(backend, large)
    assert backend._workspace.data_ptr() == workspace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: setattr(s, "q", s.q[:, :2]), r"\[T, Hq, D\]"),
        (lambda s: setattr(s, "k", s.k[:3]), r"\[T, Hkv, D\]"),
        (lambda s: setattr(s, "v", s.v.half()), "one dtype"),
        (
            lambda s: setattr(s, "k", s.k.transpose(1, 2).contiguous().transpose(1, 2)),
            "contiguous heads",
        ),
        (
            lambda s: setattr(s, "layer", replace(s.layer, sinks=torch.zeros(4).half())),
            r"f32\[Hq\]",
        ),
        (
            lambda s: setattr(s, "layer", replace(s.layer, kv_scales=torch.ones(2).double())),
            r"kv_scales must be f32\[2\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(backend, change, message):
    step = Step(plain(CAPABILITIES, Row(0, 20), seed=5), "cpu")
    change(step)
    with pytest.raises(PluginError, match=message):
        run(backend, step)


@pytest.mark.parametrize(
    "change",
    [
        {"block_table": torch.zeros(1, 1, dtype=torch.int32)},
        {"slot_mapping": torch.zeros(19).long()},
    ],
)
def test_a_batch_that_is_too_short_is_refused(backend, change):
    """The kernel would read past the end of the tensor."""
    step = Step(plain(CAPABILITIES, Row(0, 20), seed=6), "cpu")
    with pytest.raises(PluginError, match="too small for"):
        backend.plan(replace(step.batch(), **change), [step.layer], 16)


def test_one_pool_of_threads(backend):
    """Two OpenMP libraries would keep two thread pools that compete for the CPU."""
    if openmp_of("torch") is None:
        pytest.skip("this PyTorch uses the system's OpenMP library, as the compiler does")
    with open("/proc/self/maps", encoding="utf-8") as maps:
        libraries = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(libraries) == 1


@pytest.mark.parametrize(("head_size", "block_size"), [(72, 16), (272, 16), (64, 8)])
def test_unsupported_sizes_are_refused(backend, head_size, block_size):
    with pytest.raises(PluginError, match="multiples of 16"):
        backend.allocate_cache(KVCacheSpec(2, block_size, 1, head_size, "float32"))


def test_a_step_of_no_rows(backend):
    step = Step(StepSpec((Row(0, 3),)), "cpu")
    batch = step.batch()
    batch = replace(batch, host_query_start=[0], host_seq_lens=[], num_seqs=0, num_tokens=0)
    backend.run(
        step.layer,
        step.q,
        step.k,
        step.v,
        backend.allocate_cache(step.cache_spec),
        backend.plan(batch, [step.layer], 16),
        step.q.clone(),
    )
