"""Decide when a failed engine process is restarted, and when restarting stops."""

from __future__ import annotations

import time

FIRST_BACKOFF, MAX_BACKOFF = 0.5, 4.0
"""Seconds before a restart; doubled each time while no request finishes in between."""
MAX_RESTARTS = 5
"""Number of restarts without a finished request in between, after which the engine has failed."""
START_SECONDS = 5.0
"""Assumed duration of a start until one has been measured."""


class Restarts:
    """Restart state of one engine. Call `begin` for each process, `ready` when it serves, and
    `failed` when it has ended."""

    def __init__(self) -> None:
        self.count = 0
        self._num_fruitless = 0
        self._num_finished = 0
        self._start_seconds = START_SECONDS
        self._began = self._back_at = 0.0

    def begin(self) -> None:
        self._began = time.monotonic()
        self._back_at = self._began + self._start_seconds

    def ready(self) -> None:
        self._start_seconds = time.monotonic() - self._began

    def failed(self, num_finished: int) -> float | None:
        """Return the seconds to wait before the next process, or None to stop restarting.
        `num_finished` counts requests since the first process."""
        if num_finished > self._num_finished:
            self._num_fruitless, self._num_finished = 0, num_finished
        if self._num_fruitless == MAX_RESTARTS:
            return None
        backoff = min(FIRST_BACKOFF * (1 << self._num_fruitless), MAX_BACKOFF)
        self._num_fruitless += 1
        self.count += 1
        self._back_at = time.monotonic() + backoff + self._start_seconds
        return backoff

    @property
    def seconds_left(self) -> float:
        """Estimated seconds until requests are accepted again; at least 1."""
        return max(1.0, self._back_at - time.monotonic())
