"""What an idle engine must not hold: the state of sequences and requests that have ended."""

from __future__ import annotations

import gc
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

from dovetail import LLM
from dovetail.engine.kv_cache import PagedKVCache
from dovetail.frontend.outputs import RequestState
from dovetail.sequence import Sequence
from dovetail.types import SamplingParams
from dovetail_testing.engines import blocks_add_up

LATER = (
    "_released",
    "batch_index_of",
    "_known",
    "_row_seq_ids",
    "_waiting",
    "_last.seq_ids",
    "_last.released",
)
"""What changes with the next plan: it tells the worker which sequences have ended, and replaces the
last one."""
BOUNDED = ("_due_at",)
"""Of the policy of drafting: by step, whom it looks at then. Who has ended by then is dropped."""
MAX_DEPTH = 12


def mark(llm: LLM, number: int) -> int:
    """Have sequences numbered from here on carry ids that nothing else has; returns the first."""
    first: int = 1_100_000_000 + number % 9_000 * 100_000
    llm.engine._seq_ids = itertools.count(first)
    return first


def assert_idle(llm: LLM, first_seq_id: int, request_ids: set[str]) -> None:
    """Nothing of these sequences and requests is left; with the next plan the worker, too, has
    forgotten them."""
    engine = llm.engine
    seq_ids = set(range(first_seq_id, next(engine._seq_ids)))
    assert not engine.has_work, "the engine has work"
    assert not engine.scheduler.waiting, f"{len(engine.scheduler.waiting)} sequences wait"
    assert not engine.scheduler.running, f"{len(engine.scheduler.running)} sequences run"
    assert engine.kv.num_used == 0, f"{engine.kv.num_used} blocks are held"
    assert not llm._outputs, "outputs are kept for nobody"
    if isinstance(engine.kv, PagedKVCache):
        blocks_add_up(engine.kv)
    found = [
        path
        for path in _holders(engine, seq_ids | request_ids)
        if not path.endswith(LATER + BOUNDED)
    ]
    assert not found, f"state of ended sequences is left in {found}"
    llm.generate([[5]], SamplingParams(max_tokens=3, ignore_eos=True))
    found = [path for path in _holders(engine, seq_ids | request_ids) if not path.endswith(BOUNDED)]
    assert not found, f"after one more request, state of ended sequences is left in {found}"


def _holders(root: Any, wanted: set[Any]) -> Iterator[str]:
    """Paths of containers, in what `root` holds, of which some keys or members are `wanted`."""
    seen: set[int] = set()
    queue = deque([("engine", root, 0)])
    while queue:
        path, value, depth = queue.popleft()
        if id(value) in seen or depth > MAX_DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, dict | set | frozenset | list | tuple | deque):
            if len(value) > 5_000:
                continue  # tables by token, slot or block
            if any(isinstance(key, int | str) and key in wanted for key in list(value)):
                yield path
            for item in value.values() if isinstance(value, dict) else value:
                if not isinstance(item, int | float | str | bytes | None):
                    queue.append((path, item, depth + 1))
        elif type(value).__module__.startswith("dovetail"):
            names = [
                *getattr(value, "__dict__", ()),
                *(n for c in type(value).__mro__ for n in getattr(c, "__slots__", ())),
            ]
            queue.extend(
                (f"{path}.{name}", getattr(value, name, None), depth + 1) for name in names
            )


def objects_of_requests() -> dict[int, str]:
    """Return the sequences and request states in this process: the type's name of each, by id."""
    gc.collect()
    return {
        id(o): type(o).__name__ for o in gc.get_objects() if type(o) in (Sequence, RequestState)
    }


def assert_none_alive(before: dict[int, str]) -> None:
    """Fail if anything in this process still refers to a sequence or a request state, apart from
    those that existed before: tracebacks of failed tests refer to some."""
    left = [name for number, name in objects_of_requests().items() if number not in before]
    assert not left, f"{len(left)} are still alive: {sorted(set(left))}"
