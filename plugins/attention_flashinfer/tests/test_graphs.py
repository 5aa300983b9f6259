"""A captured decode step computes the steps that are planned later, if captured operations write
the block tables."""

from __future__ import annotations

import copy
from dataclasses import replace

import fake_flashinfer
import pytest
import torch
from fake_device import Recorded
from torch.utils._python_dispatch import _disable_current_modes

from dovetail_attention_flashinfer import FlashInferOptions
from dovetail_attention_flashinfer.backend import FlashInferAttention
from dovetail_testing.attention_steps import Row, Step, StepSpec, padded

WIDTH, DEVICE_FIELDS = 20, ("query_start", "seq_lens", "block_table", "slot_mapping")


class Kernels(Recorded):
    """Records launches with their plan and tensors. A replay reads the current content of the
    tensors."""

    def launch(self, wrapper, *given):
        frozen = copy.copy(wrapper)

        def again():
            fake_run(frozen, *given)

        with _disable_current_modes():
            again()
        self._calls.append((again, (), {}, None))


fake_run = fake_flashinfer.Wrapper._run


def steps(rows, group, window, kv_dtype):
    """Return a step for each of two layers, with separate caches and scales and the same blocks."""
    spec = StepSpec(rows, "bfloat16", kv_dtype, num_heads=2 * group, window=window)
    found = [Step(replace(spec, seed=seed), "cpu") for seed in (3, 4)]
    found[1].blocks = found[0].blocks
    found[1].rebuilt()
    return found


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("group", [2, 7])
def test_later_steps(group, window, kv_dtype, monkeypatch):
    first = steps((Row(17, 1), Row(0, 1), Row(250, 1)), group, window, kv_dtype)
    ours = FlashInferAttention("cpu", FlashInferOptions(workspace_mb=16), fake_flashinfer, 256)
    later = [
        steps(rows, group, window, kv_dtype)
        for rows in ((Row(300, 1), Row(31, 1)), (Row(0, 1), Row(1, 1), Row(260, 1)))
    ]
    layers = [replace(step.layer, index=i) for i, step in enumerate(first)]
    own, given = padded(first[0].batch(WIDTH), 1), padded(first[0].batch(WIDTH), 1)
    for name in DEVICE_FIELDS[1:]:
        getattr(own, name).zero_()
    inputs = [
        [torch.zeros(4, x.shape[1], 64, dtype=x.dtype) for x in (s.q, s.k, s.v)] for s in first
    ]
    outs = [torch.zeros_like(q) for q, _, _ in inputs]
    caches = [ours.allocate_cache(replace(s.cache_spec, num_blocks=60)) for s in first]
    plan = ours.plan(own, layers, 16)

    def forward():
        for name in DEVICE_FIELDS:
            getattr(own, name).copy_(getattr(given, name))
        for layer, (q, k, v), cache, out in zip(layers, inputs, caches, outs, strict=True):
            ours.run(layer, q, k, v, cache, plan, out)

    forward()
    recorded = Kernels()
    monkeypatch.setattr(
        fake_flashinfer.Wrapper, "_run", lambda self, *given: recorded.launch(self, *given)
    )
    with recorded:
        forward()
    monkeypatch.undo()
    for pair in later:
        count = len(pair[0].spec.rows)
        batch = padded(pair[0].batch(WIDTH), 4 - count)
        fresh = replace(batch, **{name: getattr(own, name) for name in DEVICE_FIELDS})
        for layer, step in zip(layers, pair, strict=True):
            if layer.kv_scales is not None:
                step.layer = replace(step.layer, kv_scales=layer.kv_scales)
                step.rebuilt()
        ours.plan(fresh, layers, 16)
        for name in DEVICE_FIELDS:
            getattr(given, name).copy_(getattr(batch, name))
        for step, tensors, cache in zip(pair, inputs, caches, strict=True):
            ours.import_kv(cache, list(range(step.num_blocks)), *step.before)
            for x, new in zip(tensors, (step.q, step.k, step.v), strict=True):
                x[:count] = new
        recorded.replay()
        for step, out in zip(pair, outs, strict=True):
            expected, allowed = step.expected()
            assert bool(((out[:count].double() - expected).abs() <= allowed).all())
