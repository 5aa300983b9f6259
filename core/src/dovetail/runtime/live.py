"""Track a request in flight in an engine process on behalf of its client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from dovetail.errors import DeadlineExceeded, DovetailError
from dovetail.frontend.outputs import Delta, RequestState
from dovetail.runtime import wire
from dovetail.types import SequenceOutput


class LiveRequest:
    """A request in flight. Outputs that the client has not fetched are collected and merged.
    `close` it when the client has been served or is gone."""

    def __init__(
        self, state: RequestState, engine_id: str, send: Callable[[msgspec.Struct], None]
    ) -> None:
        self.state = state
        self.engine_id = engine_id
        """Request id in the engine. It is never reused, so that outputs and aborts of a cancelled
        request cannot be mistaken for those of a later request with the same id."""
        self.error: DovetailError | None = None
        self.changed = asyncio.Event()
        self._outputs: list[SequenceOutput] = []
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
        self._outputs.append(output)
        self.changed.set()

    def fail(self, error: DovetailError) -> None:
        self.error = error
        self.changed.set()

    def deltas(self) -> list[Delta]:
        """Return the new output, one delta per sample. Aborts samples that a stop string ended, and
        requests that failed."""
        outputs, self._outputs = self._outputs, []
        merged: dict[int, Delta] = {}
        for output in outputs:
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
        """Cancel the deadlines, and abort the request if it is still running."""
        for deadline in self._deadlines:
            deadline.cancel()
        if not self.state.finished and self.error is None:
            self._send(wire.Abort(self.engine_id))

    def _expire(self, seconds: float) -> None:
        self._send(wire.Abort(self.engine_id))
        self.fail(DeadlineExceeded(f"the request took longer than {seconds:g} s (request_timeout)"))
