"""The provider fulfils the contract on a fake FlashInfer, so FlashInfer receives the right
arguments."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import fake_flashinfer
import pytest
import torch

import dovetail_attention_flashinfer as plugin
from dovetail.errors import PluginError
from dovetail.facts import device_facts
from dovetail.facts.gpus import GpuFacts
from dovetail.plugin.provider import Context, no_reasons
from dovetail_attention_flashinfer import (
    FLASHINFER,
    FLASHINFER_CAPABILITIES,
    FlashInferOptions,
    why_no_flashinfer,
)
from dovetail_attention_flashinfer.backend import MOST_EAGER, FlashInferAttention
from dovetail_attention_flashinfer.work import Geometry
from dovetail_attention_flashinfer.workspace import workspace_bytes
from dovetail_testing.attention import AttentionContract
from dovetail_testing.attention_steps import Row, Step, StepSpec

FAKE = replace(
    FLASHINFER,
    capabilities=replace(FLASHINFER_CAPABILITIES, devices=("cpu",)),
    why_not=no_reasons,
    build=lambda context, options: FlashInferAttention("cpu", options, fake_flashinfer, 256),
)


class TestFlashInfer(AttentionContract):
    provider = FAKE
    options = {"workspace_mb": 16}  # noqa: RUF012


DECODE, MIXED = (Row(90, 1), Row(3, 1), Row(200, 1)), (Row(90, 1), Row(0, 40), Row(200, 7))


def backend(**options):
    return FlashInferAttention(
        "cpu", FlashInferOptions(**{"workspace_mb": 16, **options}), fake_flashinfer, 256
    )


def filled(backend, step):
    cache = backend.allocate_cache(step.cache_spec)
    backend.import_kv(cache, list(range(step.num_blocks)), *step.before)
    return cache


def is_close(step, out):
    expected, allowed = step.expected()
    return bool(((out.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("window", [None, 50])
def test_the_batch_is_written_after_the_plan(rows, window):
    """Captured operations write block tables and slots after the plan has been made from the
    numbers on the host."""
    step = Step(StepSpec(rows, "bfloat16", "bfloat16", window=window, seed=1), "cpu")
    batch, ours = step.batch(), backend()
    written = {
        name: getattr(batch, name).clone()
        for name in ("block_table", "slot_mapping", "seq_lens", "query_start")
    }
    for name in written:
        getattr(batch, name).zero_()
    plan, cache, out = (
        ours.plan(batch, [step.layer], step.spec.block_size),
        filled(ours, step),
        torch.empty_like(step.q),
    )
    for name, numbers in written.items():
        getattr(batch, name).copy_(numbers)
    ours.run(step.layer, step.q, step.k, step.v, cache, plan, out)
    assert is_close(step, out)


@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
def test_layers_of_one_geometry_are_planned_once(rows, monkeypatch):
    """Each of the layers has its own cache and scales."""
    specs = [
        StepSpec(rows, "bfloat16", "float8_e4m3fn", kv_range=largest)
        for largest in ((2.0, 4.0), (4.0, 1.0))
    ]
    steps = [Step(spec, "cpu") for spec in specs]
    layers = [replace(step.layer, index=i) for i, step in enumerate(steps)]
    ours, plans = backend(), []
    wrapper = fake_flashinfer.Wrapper
    counted = wrapper._plan
    monkeypatch.setattr(
        wrapper, "_plan", lambda self, *given: (plans.append(self), counted(self, *given))
    )
    for _ in range(2):  # dtypes are known from the second step on
        plan, before = ours.plan(steps[0].batch(), layers, 16), len(plans)
        for step, layer in zip(steps, layers, strict=True):
            out, cache = torch.empty_like(step.q), filled(ours, step)
            ours.run(layer, step.q, step.k, step.v, cache, plan, out)
            assert is_close(step, out)
    assert len(plans) == 2
    assert before == 2


def test_a_layer_that_runs_alone():
    """A shadow run runs some layers of a plan only."""
    step = Step(StepSpec(MIXED, "bfloat16", "bfloat16"), "cpu")
    ours, second = backend(), replace(step.layer, index=1)
    plan, cache, out = (
        ours.plan(step.batch(), [step.layer, second], 16),
        filled(ours, step),
        torch.empty_like(step.q),
    )
    ours.run(second, step.q, step.k, step.v, cache, plan, out)
    assert is_close(step, out)


def test_decode_steps_of_one_size_use_the_same_buffers():
    """The buffers of a batch size are those of its captured graph, whatever other sizes run in
    between."""
    ours, places = backend(), []
    for rows in (DECODE, DECODE[:2], DECODE, MIXED, DECODE):
        step = Step(StepSpec(rows, "bfloat16", "bfloat16"), "cpu")
        plan, cache, out = (
            ours.plan(step.batch(40), [step.layer], 16),
            filled(ours, step),
            torch.empty_like(step.q),
        )
        ours.run(step.layer, step.q, step.k, step.v, cache, plan, out)
        (work,) = (s.work for s in plan.values())
        wrapper = next(iter(work._wrappers.values()))
        names = (
            "_paged_kv_indptr_buf",
            "_paged_kv_indices_buf",
            "_paged_kv_last_page_len_buf",
            "_int_workspace_buffer",
        )
        places.append(
            (wrapper, *(getattr(wrapper, name).data_ptr() for name in names), work.slots.data_ptr())
        )
    assert places[0] == places[2] == places[4]
    assert places[0] != places[1]


def test_block_tables_of_other_shapes():
    """Positions in one block table may be beyond another one, as with tables of different
    engines."""
    ours = backend()
    for rows, width in (
        ((Row(9, 1), Row(20, 1)), 3),
        ((Row(700, 1), Row(90, 1)), 50),
        ((Row(30, 1), Row(9, 1)), 2),
    ):
        step = Step(StepSpec(rows, "bfloat16", "bfloat16"), "cpu")
        plan, cache, out = (
            ours.plan(step.batch(width), [step.layer], 16),
            filled(ours, step),
            torch.empty_like(step.q),
        )
        ours.run(step.layer, step.q, step.k, step.v, cache, plan, out)
        assert is_close(step, out)


def run(ours, step, width=None):
    """Run a step, check its output, and return its work."""
    plan, cache, out = (
        ours.plan(step.batch(width), [step.layer], 16),
        filled(ours, step),
        torch.empty_like(step.q),
    )
    ours.run(step.layer, step.q, step.k, step.v, cache, plan, out)
    assert is_close(step, out)
    (work,) = (s.work for s in plan.values())
    return work


@pytest.mark.parametrize("window", [None, 50])
def test_eager_steps_share_wrappers_as_their_tables_grow(window, monkeypatch):
    """A table grows by a column every 16 tokens and shrinks when a long row ends. Tables of the
    same rounded width share a wrapper."""
    built, wrapper = [], fake_flashinfer.BatchDecodeWithPagedKVCacheWrapper
    init = wrapper.__init__
    monkeypatch.setattr(
        wrapper,
        "__init__",
        lambda self, *given, **named: (built.append(self), init(self, *given, **named))[0],
    )
    ours = backend()
    for width in (*range(58, 65), *range(64, 56, -1)):
        run(
            ours,
            Step(
                StepSpec(
                    (Row(16 * width - 5, 1), Row(9, 1)), "bfloat16", "bfloat16", window=window
                ),
                "cpu",
            ),
            width,
        )
    assert len(built) == 1


def test_eager_steps_keep_few_wrappers(monkeypatch):
    """Wrappers of few batch sizes are kept, and all that a graph has captured."""
    ours, steps = (
        backend(),
        [Step(StepSpec((Row(20, 1),) * n, "bfloat16", "bfloat16"), "cpu") for n in range(1, 40)],
    )
    monkeypatch.setattr(ours, "_is_capturing", lambda: True)
    captured = [run(ours, step) for step in steps[:3]]
    monkeypatch.undo()
    works = [weakref.ref(run(ours, step)) for step in steps[3:]]
    gc.collect()
    assert sum(work() is not None for work in works) == MOST_EAGER
    assert [run(ours, step) for step in steps[:3]] == captured


LARGE = StepSpec(
    (Row(2, 1),) * 256, "bfloat16", "bfloat16", num_heads=64, num_kv_heads=8, head_size=128
)


def test_the_workspace_is_sized_for_the_largest_step():
    """64 heads of size 128, 8 KV heads and 256 rows need 383 tiles of 16 rows, each with a vector
    and a logarithm in float32."""
    small = Step(replace(LARGE, rows=LARGE.rows[:3]), "cpu")
    ours = backend(workspace_mb=None)
    first = run(ours, small)._workspace
    assert run(ours, Step(LARGE, "cpu"))._workspace is first, (
        "allocated once, before anything is captured"
    )
    assert first.nbytes >= 64 * 383 * 16 * (128 + 1) * 4
    with pytest.raises(
        PluginError, match=r"not enough workspace \(128 MiB\) for a step of 256 rows"
    ):
        run(backend(workspace_mb=128), Step(LARGE, "cpu"))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rows", "sms", "mib"),
    [
        (64, 8, 128, 256, 132, 193.0),
        (64, 8, 128, 512, 132, 386.5),
        (32, 8, 128, 256, 132, 80.4),
        (32, 32, 64, 256, 132, 8.1),
        (16, 1, 256, 8, 132, 265.0),
        (64, 8, 128, 1, 132, 133.0),
        (40, 1, 128, 100, 132, 665.2),
    ],
)
def test_workspace_bytes(heads, kv_heads, size, rows, sms, mib):
    geometry = Geometry(heads, kv_heads, size, 1.0, None, None)
    assert round(workspace_bytes(geometry, rows, sms) / 2**20, 1) == mib


@pytest.mark.parametrize("name", ["auto", "fa2", "fa3"])
def test_backend_of_prefill(name):
    ours, step = backend(backend=name), Step(StepSpec(MIXED, "bfloat16", "bfloat16"), "cpu")
    plan, cache = ours.plan(step.batch(), [step.layer], 16), filled(ours, step)
    ours.run(step.layer, step.q, step.k, step.v, cache, plan, torch.empty_like(step.q))
    (work,) = (s.work for s in plan.values())
    assert [w.backend for w in work._wrappers.values()] == [name]


def test_a_step_too_large_for_the_workspace(monkeypatch):
    def overflow(*given):
        raise RuntimeError(
            "Buffer overflow when allocating memory for tmp_v. Increase the workspace buffer size."
        )

    monkeypatch.setattr(fake_flashinfer.Wrapper, "_plan", overflow)
    ours, step = backend(), Step(StepSpec(DECODE, "bfloat16", "bfloat16"), "cpu")
    plan, cache = ours.plan(step.batch(), [step.layer], 16), filled(ours, step)
    with pytest.raises(
        PluginError, match=r"not enough workspace \(16 MiB\) for a step of 3 rows .* raise"
    ):
        ours.run(step.layer, step.q, step.k, step.v, cache, plan, torch.empty_like(step.q))


H200 = GpuFacts("NVIDIA H200", (9, 0), 150_000_000_000, (13, 0))


@pytest.mark.parametrize(
    ("gpu", "flashinfer", "torch", "reasons"),
    [
        (H200, "0.6.13", "2.11.0+cu130", []),
        (H200, "0.6.18.post1", "2.6.0", []),
        (
            H200,
            None,
            "2.11.0",
            ["FlashInfer is not installed (pip install 'flashinfer-python>=0.6.13,<0.7')"],
        ),
        (
            H200,
            "0.6.12",
            "2.11.0",
            ["FlashInfer 0.6.12 is installed, but this plugin has not been tested with it"],
        ),
        (
            H200,
            "0.7.0",
            "2.11.0",
            ["FlashInfer 0.7.0 is installed, but this plugin has not been tested with it"],
        ),
        (
            H200,
            "0.6.13",
            "2.5.1",
            ["requires PyTorch 2.6 or newer, but the installed version is 2.5.1"],
        ),
        (replace(H200, capability=(7, 5)), "0.6.13", "2.11.0", ["requires sm_80 or newer"]),
    ],
)
def test_why_not(monkeypatch, gpu, flashinfer, torch, reasons):
    monkeypatch.setattr(plugin, "installed", {"flashinfer-python": flashinfer, "torch": torch}.get)
    found = why_no_flashinfer(
        Context(replace(device_facts(), gpus=(gpu,)), None, "cuda:0", "bfloat16")
    )
    assert [str(r)[: len(reason)] for r, reason in zip(found, reasons, strict=True)] == reasons
