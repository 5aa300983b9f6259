"""When a process that has died is started again, and when it is given up."""

from __future__ import annotations

import time

FIRST_BACKOFF, MAX_BACKOFF = 0.5, 4.0
"""Seconds before a restart: they double while no request finishes in between."""
MAX_RESTARTS = 5
"""Restarts without any request that finished in between, after which the engine is given up."""
START_SECONDS = 5.0
"""That a start is taken to last until one has been seen."""


class Restarts:
    """Of one engine. `begin` with each process, `ready` when it serves, `failed` when it has
    ended."""

    def __init__(self) -> None:
        self.count = 0
        self._num_in_vain = 0
        self._num_finished = 0
        self._start_seconds = START_SECONDS
        self._began = self._back_at = 0.0

    def begin(self) -> None:
        self._began = time.monotonic()
        self._back_at = self._began + self._start_seconds

    def ready(self) -> None:
        self._start_seconds = time.monotonic() - self._began

    def failed(self, num_finished: int) -> float | None:
        """Seconds to wait before the next process, or None to give up. `num_finished` counts
        requests since the first one."""
        if num_finished > self._num_finished:
            self._num_in_vain, self._num_finished = 0, num_finished
        if self._num_in_vain == MAX_RESTARTS:
            return None
        backoff = min(FIRST_BACKOFF * (1 << self._num_in_vain), MAX_BACKOFF)
        self._num_in_vain += 1
        self.count += 1
        self._back_at = time.monotonic() + backoff + self._start_seconds
        return backoff

    @property
    def seconds_left(self) -> float:
        """Until requests are likely to be taken; at least 1."""
        return max(1.0, self._back_at - time.monotonic())
