"""Memory of a cache is prefaulted shortly before it is used."""

from __future__ import annotations

import ctypes
import gc
import time
import weakref

import pytest

from dovetail.native import zeros
from dovetail_attention_cpu import ahead
from dovetail_attention_cpu.ahead import Ahead

MIB = 2**20
SLOTS = 1024


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(ahead, "PAUSE", 0)


def num_present(memory):
    """Return the number of resident bytes according to mincore."""
    pages = (ctypes.c_ubyte * (len(memory) // 4096))()
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert (
        ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), pages)
        == 0
    )
    return 4096 * sum(page & 1 for page in pages)


def wait_until_present(memory, expected):
    """Return the number of resident bytes once it has reached `expected`, or after 10 s."""
    until = time.monotonic() + 10
    while num_present(memory) < expected and time.monotonic() < until:
        time.sleep(0.01)
    return num_present(memory)


def caches(count, num_bytes=32 * MIB):
    of = Ahead(16 * MIB)
    memories = [zeros(num_bytes) for _ in range(count)]
    for memory in memories:
        of.add(memory, SLOTS)
    return of, memories


def test_nothing_is_present_before_a_step():
    assert [num_present(m) for m in caches(2)[1]] == [0, 0]


def test_all_layers_share_the_prefaulted_bytes():
    of, memories = caches(2)
    of.reach(0)
    assert all(8 * MIB <= wait_until_present(m, 8 * MIB) <= 12 * MIB for m in memories)


def test_more_is_prefaulted_before_the_end_is_reached():
    of, (memory,) = caches(1)
    of.reach(0)
    wait_until_present(memory, 16 * MIB)
    of.reach(SLOTS // 2 - 1)
    assert wait_until_present(memory, 32 * MIB) == 32 * MIB


def test_prefaulting_keeps_the_content():
    of, (memory,) = caches(1)
    memory[5 * MIB] = 7
    of.reach(SLOTS - 1)
    wait_until_present(memory, 32 * MIB)
    assert memory[5 * MIB] == 7
    assert memory[5 * MIB + 1] == 0


def test_an_unused_cache_is_freed():
    of, memories = caches(1)
    gone = weakref.ref(memories.pop())
    gc.collect()
    of.reach(0)
    assert gone() is None


def test_a_system_without_prefaulting_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(ahead, "MADV_POPULATE_WRITE", 12345)
    of, (memory,) = caches(1)
    with caplog.at_level("INFO"):
        of.reach(0)
        until = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.01)
        of.reach(SLOTS - 1)
    assert ["(Invalid argument)" in m for m in caplog.messages] == [True]
    assert num_present(memory) == 0
