"""Provide a clock whose time passes only when something sleeps, so that a test of an hour takes no
time and has the same result on every machine."""

from __future__ import annotations


class VirtualClock:
    """A `dovetail.interfaces.clock.Clock`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
