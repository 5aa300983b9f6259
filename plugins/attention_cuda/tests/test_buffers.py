"""The device memory that the Triton backend keeps between steps is bounded and has stable
addresses."""

from __future__ import annotations

import gc

import pytest
import torch

from dovetail_attention_cuda.backend import Geometry, TritonAttention
from dovetail_testing.attention_steps import Row, Step, StepSpec

NUM_KV_HEADS, GROUP = 2, 4
ORDERS = {"largest first": range(64, 0, -1), "smallest first": range(1, 65)}


def bytes_held() -> int:
    """Return the total size of the storages of all live tensors."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) is torch.Tensor:
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def step_of(num_rows: int) -> Step:
    return Step(
        StepSpec(
            (Row(40, 1),) * num_rows, num_heads=NUM_KV_HEADS * GROUP, num_kv_heads=NUM_KV_HEADS
        ),
        "cpu",
    )


def held_after(sizes) -> int:
    """Return the bytes that a backend holds after it has planned decode steps of the given
    sizes."""
    backend, before = TritonAttention("cpu"), bytes_held()
    for num_rows in sizes:
        step = step_of(num_rows)
        backend.plan(step.batch(), [step.layer], step.spec.block_size)
    del step
    return bytes_held() - before


@pytest.mark.parametrize("order", ORDERS)
def test_all_numbers_of_rows_share_what_the_largest_needs(order):
    largest = held_after([64])
    assert largest > 0
    assert held_after(ORDERS[order]) <= largest * (1 if order == "largest first" else 4)


def test_what_was_planned_once_stays_where_it_is():
    """A captured graph reads the buffers, whatever sizes are planned later, in any order."""
    backend, places = TritonAttention("cpu"), {}
    for num_rows in (4, 64, 1, 4, 300, 64, 4, 1, 300):
        step = step_of(num_rows)
        (work,) = backend.plan(step.batch(), [step.layer], step.spec.block_size)[
            Geometry.of(step.layer)
        ].works
        tensors = (
            work.pieces,
            work.num_pieces,
            work.tiles,
            work.partials.sums,
            work.partials.tops,
            work.partials.weights,
        )
        now = [(x.data_ptr(), tuple(x.shape)) for x in tensors]
        assert places.setdefault(num_rows, now) == now
