"""A request in flight in another process, as its waiting client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from dovetail.errors import DeadlineExceeded, DovetailError
from dovetail.frontend.outputs import Delta, RequestState
from dovetail.runtime import wire
from dovetail.types import SequenceOutput


class LiveRequest:
    """Outputs that nobody has fetched yet pile up and are merged. `close` it when its client has
    gone or is served."""

    def __init__(
        self, state: RequestState, engine_id: str, send: Callable[[msgspec.Struct], None]
    ) -> None:
        self.state = state
        self.engine_id = engine_id
        """Its id in the engine: never used twice, so that outputs and aborts of a cancelled request
        cannot be taken for those of a later one with the same id."""
        self.error: DovetailError | None = None
        self.changed = asyncio.Event()
        self._news: list[SequenceOutput] = []
        self._send = send
        self._deadlines: list[asyncio.TimerHandle] = []

    def limit(self, queue_timeout: float | None, request_timeout: float | None) -> None:
        """Set the deadlines, in seconds from now."""
        loop = asyncio.get_running_loop()
        if queue_timeout is not None:
            self._deadlines.append(
                loop.call_later(queue_timeout, self._send, wire.Expire(self.engine_id))
            )
        if request_timeout is not None:
            self._deadlines.append(loop.call_later(request_timeout, self._expire, request_timeout))

    def push(self, output: SequenceOutput) -> None:
        self._news.append(output)
        self.changed.set()

    def fail(self, error: DovetailError) -> None:
        self.error = error
        self.changed.set()

    def deltas(self) -> list[Delta]:
        """What is new, one delta a sample. Samples that a stop string ends, and requests that fail,
        are aborted."""
        news, self._news = self._news, []
        merged: dict[int, Delta] = {}
        for output in news:
            try:
                delta, abort = self.state.push(output)
            except DovetailError as e:
                self.error = e
                self._send(wire.Abort(self.engine_id))
                break
            if abort:
                self._send(wire.Abort(self.engine_id, output.sample_index))
            if delta is None:
                continue
            if delta.index in merged:
                merged[delta.index].extend(delta)
            else:
                merged[delta.index] = delta
        return list(merged.values())

    def close(self) -> None:
        """No more deadlines, and no more work for it."""
        for deadline in self._deadlines:
            deadline.cancel()
        if not self.state.finished and self.error is None:
            self._send(wire.Abort(self.engine_id))

    def _expire(self, seconds: float) -> None:
        self._send(wire.Abort(self.engine_id))
        self.fail(DeadlineExceeded(f"the request took longer than {seconds:g} s (request_timeout)"))
