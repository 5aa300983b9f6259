"""Define the clock. Whatever decides something by time is given one and never reads `time` itself,
so that the same code runs under a virtual clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Tells and passes time; one object per engine."""

    def now(self) -> float:
        """Return seconds since an arbitrary point in time. They never decrease."""

    def sleep(self, seconds: float) -> None:
        """Return after this time."""


class SystemClock:
    """The machine's clock."""

    now = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)
