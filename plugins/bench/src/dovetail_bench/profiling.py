"""Measure where the time of a step goes, by wrapping methods of a running engine's objects.

The engine is not aware of this, so there is no cost if it is not used.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from dovetail.engine.engine import Engine
from dovetail.types import StepPlan
from dovetail_bench.load import ClosedLoop

PARTS = ("schedule", "forward", "sampling", "commit", "text")
"""Phases of a step in order. forward: inputs, model and logits. text: detokenization in the
front-end."""


class Profile:
    """Records the durations of method calls, until `close`:

        with Profile() as profile:
            profile.watch("schedule", engine.scheduler, "schedule")
            ...
        profile.seconds["schedule"]  # one entry per call

    A call inside another watched call counts in both.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._undo: list[Callable[[], None]] = []

    def watch(self, part: str, owner: Any, method: str) -> None:
        call, seconds, clock = getattr(owner, method), self.seconds, time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[part].append(clock() - began)

        self._replace(owner, method, timed)

    def watch_engine(self, engine: Engine) -> None:
        """Watch the phases of a step in the plain loop. In the overlapped loop, `submit` returns
        before the work is done."""
        submit = engine.worker.submit

        def submit_without_sampling(plan: StepPlan) -> Any:
            # By the worker's contract, sampling then happens in `sample`, which is timed by itself.
            plan.masked = True
            return submit(plan)

        self._replace(engine.worker, "submit", submit_without_sampling)
        self.watch("schedule", engine.scheduler, "schedule")
        self.watch("forward", engine.worker, "submit")
        self.watch("sampling", engine.worker, "sample")
        self.watch("commit", engine, "commit")

    def watch_loop(self, loop: ClosedLoop) -> None:
        self.watch("text", loop, "text")
        self.watch("step", loop, "step")

    def microseconds_a_step(self) -> dict[str, float]:
        """Return mean durations: `step` for the whole step, then each of PARTS and `other`, which
        add up to it."""
        num_steps = len(self.seconds["step"])
        out = {part: 1e6 * sum(self.seconds[part]) / num_steps for part in ("step", *PARTS)}
        return {**out, "other": max(0.0, out["step"] - sum(out[part] for part in PARTS))}

    def _replace(self, owner: Any, method: str, wrapper: Callable[..., Any]) -> None:
        before = vars(owner).get(method)
        if before is None:
            self._undo.append(lambda: delattr(owner, method))
        else:
            self._undo.append(lambda: setattr(owner, method, before))
        setattr(owner, method, wrapper)

    def close(self) -> None:
        """Restore the watched objects."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
