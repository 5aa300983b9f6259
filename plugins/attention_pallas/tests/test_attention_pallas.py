"""The kernel fulfils the contract in interpreter mode, lowers to one custom call for TPU, and keeps
the package's other guarantees."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

import jax
import jax.export  # not part of `import jax`
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dovetail.errors import PluginError
from dovetail.facts import device_facts
from dovetail.plugin.provider import Context
from dovetail_attention_pallas import CAPABILITIES, PROVIDER, why_not
from dovetail_attention_pallas.backend import PallasAttention
from dovetail_attention_pallas.kernel import Cache, paged_attention
from dovetail_attention_pallas.schedule import Schedule, make_schedule, padded
from dovetail_testing.attention import AttentionContract
from dovetail_testing.attention_steps import Row, Step, plain


class TestPallas(AttentionContract):
    provider = PROVIDER


MIXED = ((0, 300), (700, 1), (40, 17))
DECODE = ((700, 1), (5, 1))


def schedule_of(
    rows: tuple[tuple[int, int], ...], block_size: int, window: int | None = None
) -> Schedule:
    """Return the schedule of a step. Rows are (number of computed tokens, number of new tokens)."""
    starts = np.cumsum([0, *(new for _, new in rows)]).tolist()
    lens = [computed + new for computed, new in rows]
    width = -(-max(lens) // block_size)
    table = np.arange(len(rows) * width).reshape(len(rows), width)
    return make_schedule(starts, lens, table, np.arange(starts[-1]), block_size, window)


@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize(
    ("group", "block_size", "dtype", "kv_dtype", "rows", "extras"),
    [
        (1, 16, "float32", "float32", MIXED, False),
        (3, 64, "bfloat16", "bfloat16", DECODE, True),
        (4, 32, "float32", "bfloat16", DECODE, False),
        (8, 256, "bfloat16", "bfloat16", MIXED, True),
    ],
)
def test_it_lowers_for_tpu(head_size, group, block_size, dtype, kv_dtype, rows, extras):
    """The kernel lowers to a custom call, not to a loop of ordinary operations. Lowering does not
    check whether it fits in the memory of a TPU."""
    schedule = schedule_of(rows, block_size)
    num_tokens, num_kv_heads = len(schedule.slot_mapping), 2
    shape = jax.ShapeDtypeStruct
    kv = shape((num_tokens, num_kv_heads, head_size), dtype)
    blocks = shape((99, num_kv_heads, block_size, head_size), kv_dtype)
    q = shape((num_tokens, num_kv_heads * group, head_size), dtype)
    sinks = shape((num_kv_heads * group,), "float32") if extras else None
    attend = functools.partial(paged_attention, scale=0.1, soft_cap=30.0 if extras else None)
    step = jax.jit(
        lambda q, k, v, cache, schedule, sinks: attend(q, k, v, cache, schedule, sinks=sinks)
    )
    exported = jax.export.export(step, platforms=["tpu"])(
        q, kv, kv, Cache(blocks, blocks), schedule, sinks
    )
    assert exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == 1
    assert [a.shape for a in exported.out_avals] == [q.shape, blocks.shape, blocks.shape]


def test_the_functional_form_is_pure():
    """Arguments and results are JAX arrays. The old cache is unchanged, and the new one has the
    keys and values of the step."""
    rng = np.random.default_rng()
    table = jnp.array([[2, 0, 1]])
    slots = [table[0, p // 16] * 16 + p % 16 for p in range(40)]
    schedule = make_schedule([0, 40], [40], table, jnp.array(slots), 16)
    q, k, v = (
        jnp.asarray(rng.standard_normal((padded(40), heads, 32)), jnp.float32)
        for heads in (4, 2, 2)
    )
    old = Cache(*(jnp.full((3, 2, 16, 32), jnp.nan) for _ in range(2)))
    out, new = paged_attention(q, k, v, old, schedule, scale=0.2, interpret=True)
    assert jnp.isnan(old.keys).all()
    np.testing.assert_array_equal(new.values[2].swapaxes(0, 1), v[:16])
    assert jnp.isnan(new.values[1, :, 8:]).all()
    logits = jnp.einsum("thd,shd->hts", q[:40], jnp.repeat(k[:40], 2, axis=1)) * 0.2
    weights = jax.nn.softmax(jnp.where(np.tri(40, dtype=bool), logits, -jnp.inf), axis=-1)
    expected = jnp.einsum("hts,shd->thd", weights, jnp.repeat(v[:40], 2, axis=1))
    np.testing.assert_allclose(out[:40], expected, rtol=1e-4, atol=1e-5)


def test_the_cache_is_updated_in_place():
    """The memory of the cache is donated to each step, so the cache is not copied for each
    layer."""
    step, backend = Step(plain(CAPABILITIES, Row(20, 3), seed=1), "cpu"), PallasAttention()
    cache = backend.allocate_cache(step.cache_spec)
    before = [x.unsafe_buffer_pointer() for x in cache.arrays]
    backend.import_kv(cache, list(range(step.num_blocks)), *step.before)
    plan = backend.plan(step.batch(), [step.layer], step.spec.block_size)
    backend.run(step.layer, step.q, step.k, step.v, cache, plan, step.q.clone())
    assert [x.unsafe_buffer_pointer() for x in cache.arrays] == before


def test_what_is_exported_is_a_copy():
    """Exported blocks must not share JAX's memory, which must not be written to, or read after it
    was donated."""
    step, backend = (
        Step(plain(CAPABILITIES, Row(20, 3), num_kv_heads=1, num_heads=1, seed=2), "cpu"),
        PallasAttention(),
    )
    cache = backend.allocate_cache(step.cache_spec)
    for exported in backend.export_kv(cache, list(range(step.num_blocks))):
        exported.fill_(1.0)
    assert not any(x.any() for x in cache.arrays)


def test_decode_steps_share_one_shape():
    """Otherwise every step would be compiled."""
    shapes = {
        tuple(np.shape(x) for x in schedule_of(tuple((length + i, 1) for i in range(9)), 16))
        for length in range(120, 200, 7)
    }
    assert len(shapes) == 1


def test_work_is_limited_to_the_window():
    """A query at position 100 with a window of 20 attends to positions 81 to 100: two blocks of 16,
    whatever came before."""
    schedule = schedule_of(((100, 1),), 16, window=20)
    assert schedule.tile_work[1] == 2
    assert schedule.work_block[:2].tolist() == [5, 6]


def test_a_step_of_no_rows():
    step, backend = Step(plain(CAPABILITIES, Row(0, 3)), "cpu"), PallasAttention()
    batch = replace(step.batch(), host_query_start=[0], host_seq_lens=[], num_seqs=0, num_tokens=0)
    out = torch.ones(3)
    backend.run(
        step.layer,
        step.q,
        step.k,
        step.v,
        backend.allocate_cache(step.cache_spec),
        backend.plan(batch, [step.layer], 16),
        out,
    )
    assert out.tolist() == [1, 1, 1]


def test_tensors_that_are_too_short_are_refused():
    step, backend = Step(plain(CAPABILITIES, Row(0, 20), seed=3), "cpu"), PallasAttention()
    plan = backend.plan(step.batch(), [step.layer], 16)
    with pytest.raises(
        PluginError, match="must hold the step's 20 tokens; they hold 20, 19, 20 and 20"
    ):
        backend.run(
            step.layer,
            step.q,
            step.k[:19],
            step.v,
            backend.allocate_cache(step.cache_spec),
            plan,
            step.q.clone(),
        )


def reasons(device: str) -> list[str]:
    return [str(r) for r in why_not(Context(device_facts(), None, device, "float32"))]


def test_why_not(monkeypatch):
    assert reasons("cpu") == []
    assert "no worker keeps its tensors on a TPU yet" in reasons("tpu:0")[0]
    monkeypatch.setitem(sys.modules, "jax", None)
    assert reasons("cpu") == ["JAX is not installed (pip install 'dovetail-attention-pallas[jax]')"]
