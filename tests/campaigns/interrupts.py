"""Ctrl-C anywhere in `LLM.generate`, `stream` and `chat`: the call ends within a step, and the LLM
goes on.

The interrupt comes at a line of the engine's own code that is counted, so that a trial can be
repeated; a second one sometimes follows at once, where it finds the worker at work.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dovetail
from campaigns.base import Campaign, Report, Trial, plugins
from campaigns.leaks import assert_idle, mark
from dovetail import LLM, SamplingParams
from dovetail_testing.plugin import SIMULATED, make_model

SOURCE = str(Path(dovetail.__file__).parent)
WORKER = "simulated.py"
"""The file whose code runs within `submit` and `sample`."""
MOST_STEPS_AFTER = 2
"""The step that runs, and under the overlapped loop the one that is in flight as well."""
PATIENCE = 20
"""Seconds after which a call does not end. None takes a tenth of it."""
INTERRUPTS_PER_LLM = 5
Call = Callable[[], list[Any]]


class Endless(BaseException):
    """Of no kind that the engine takes for a plugin's error."""


class Lines:
    """Counts the lines that are run in `dovetail`, and interrupts at one of them. Ends a call that
    does not end."""

    def __init__(self, llm: LLM, at: int | None = None, *, twice: bool = False) -> None:
        self._llm, self._stats, self._at, self._twice = llm, llm.engine.stats, at, twice
        self.count = 0
        self.between_steps: dict[str, list[int]] = {}
        """By place, the counts at which an interrupt takes effect at once."""
        self.where = ""
        self.num_steps_before: int | None = None
        """When the interrupt came; None if it has not."""

    def run(self, call: Call) -> list[Any]:
        self._limit = time.monotonic() + PATIENCE
        sys.settrace(self._enter)
        try:
            return call()
        except Endless:
            raise AssertionError(f"it has not ended after {PATIENCE} s") from None
        finally:
            sys.settrace(None)

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(SOURCE) else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.count += 1
            if time.monotonic() > self._limit:
                self._llm._engine = None  # or the call would go on waiting while it is left
                raise Endless
            if self._at is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self.between_steps.setdefault(_place(frame), []).append(self.count)
            if self.count == self._at:
                self.where = _place(frame)
                self.num_steps_before = self._stats.num_steps
                signal.raise_signal(signal.SIGINT)
                if self._twice and self.where.split(":")[0].endswith(WORKER):
                    signal.raise_signal(signal.SIGINT)
        return self._line


def _place(frame: Any) -> str:
    return f"{frame.f_code.co_filename.removeprefix(SOURCE)}:{frame.f_lineno}"


def calls(llm: LLM, rng: random.Random) -> dict[str, Call]:
    params = SamplingParams(
        max_tokens=rng.randint(2, 12), seed=rng.randrange(99), n=rng.choice([1, 2]), ignore_eos=True
    )
    prompts = [rng.choice("abc") * rng.randint(1, 30) for _ in range(rng.randint(1, 4))]
    messages = [{"role": "user", "content": prompts[0]}]

    def streamed() -> list[Any]:
        return sorted((d.index, t) for d in llm.stream(prompts[0], params) for t in d.token_ids)

    return {
        "generate": lambda: [
            c.token_ids for out in llm.generate(prompts, params) for c in out.outputs
        ],
        "stream": streamed,
        "chat": lambda: [c.token_ids for c in llm.chat(messages, params).outputs],
    }


def settings(rng: random.Random) -> dict[str, Any]:
    speculation = {"use": "ngram", "num_draft_tokens": 3, "adaptive": False, "min_ngram": 1}
    return {
        "overlap": rng.random() < 0.5,
        "speculation": rng.choice(["none", speculation]),
        "prefix_cache": rng.choice(["none", "hash"]),
        "max_num_waiting": rng.choice([2, 100]),
        "scheduler": {
            "max_num_seqs": rng.randint(1, 4),
            "max_num_batched_tokens": rng.choice([5, 100]),
        },
        "kv_cache": {"block_size": 4},
    }


@contextlib.contextmanager
def opened(report: Report) -> Iterator[Trial]:
    with tempfile.TemporaryDirectory() as folder, plugins(Path(folder) / "site"):
        model = make_model(Path(folder) / "model")
        before = signal.signal(signal.SIGINT, signal.default_int_handler)

        def trial(seed: int) -> None:
            rng = random.Random(seed)
            with LLM(model, device="cpu", **SIMULATED, **settings(rng)) as llm:
                for _ in range(INTERRUPTS_PER_LLM):
                    _interrupt(llm, rng, report)

        try:
            yield trial
        finally:
            signal.signal(signal.SIGINT, before)


def _interrupt(llm: LLM, rng: random.Random, report: Report) -> None:
    name, call = rng.choice(list(calls(llm, rng).items()))
    expected, counting = call(), Lines(llm)
    counting.run(call)  # as the next run will be, with the same prompts in the prefix cache
    first = mark(llm, rng.randrange(9_000))
    at = rng.randint(1, counting.count)  # mostly within a step
    if (
        rng.random() < 0.6
    ):  # every line between steps is as likely as any other, however often it is run
        at = rng.choice(rng.choice(list(counting.between_steps.values())))
    lines = Lines(llm, at, twice=rng.random() < 0.3)
    try:
        lines.run(call)
    except KeyboardInterrupt:
        report.counts[f"{name} interrupted"] += 1
    else:
        assert lines.num_steps_before is None, f"{name} went on after an interrupt at {lines.where}"
    where = f"{name}, interrupted at {lines.where}"
    if lines.num_steps_before is not None:
        num_steps = llm.engine.stats.num_steps - lines.num_steps_before
        assert num_steps <= MOST_STEPS_AFTER, f"{where}: {num_steps} more steps"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, (
        f"{where}: the handler was not put back"
    )
    try:
        again = Lines(llm).run(call)
        assert again == expected, f"then it says {again}, and before {expected}"
        assert_idle(llm, first, set())
    except Exception as e:
        raise AssertionError(f"{where}: {type(e).__name__}: {e}") from e


INTERRUPTS = Campaign(
    "interrupts",
    "Ctrl-C at any line of generate, stream and chat: it ends within a step, and the LLM goes on",
    opened,
    full=500 // INTERRUPTS_PER_LLM,
    slice=6,
)
