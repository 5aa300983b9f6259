"""Merge the outputs of several requests into one stream, send them as events, and cancel the work
of clients that disconnect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dovetail.frontend.outputs import Delta
from dovetail.types import Request

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client closed the connection, so no response can be sent."""


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`. If the client disconnects first, cancel it and raise `ClientDisconnected`."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(StreamingResponse):
    """A response of server-sent events. An error before the first event is raised, so that it
    becomes a plain HTTP error."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def deliver() -> None:
            async with aclosing(self._events) as events:
                event = await anext(events)
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                await send({"type": "http.response.body", "body": event, "more_body": True})
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        with suppress(ClientDisconnected):
            await run_until_disconnect(receive, deliver())


def merge_streams(
    requests: list[Request], run: Callable[[Request], AsyncGenerator[Delta]]
) -> AsyncGenerator[Delta]:
    """Return the deltas of all samples of all requests, as they arrive. `index` becomes the index
    of the choice: all samples of the first prompt, then those of the next."""
    return run(requests[0]) if len(requests) == 1 else _interleave(requests, run)


async def _interleave(
    requests: list[Request], run: Callable[[Request], AsyncGenerator[Delta]]
) -> AsyncGenerator[Delta]:
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    async def pump(first: int, request: Request) -> None:
        try:
            async with aclosing(run(request)) as deltas:
                async for delta in deltas:
                    delta.index += first
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as e:
            queue.put_nowait(e)

    tasks = [asyncio.create_task(pump(i * r.params.n, r)) for i, r in enumerate(requests)]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
