"""Parse JSON bodies without blocking the event loop for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope

LONG_BODY = 256 * 1024
"""Size in bytes from which a body is parsed in a thread, with orjson. orjson is several times as
fast as `json`, and it is strict, so that invalid JSON is not reported as an invalid field. One body
is parsed at a time, because orjson holds the GIL."""


class JSONRoute(APIRoute):
    """A route that parses long bodies in a thread."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, parsing = super().get_route_handler(), asyncio.Semaphore(1)

        async def handle_json(request: Request) -> Response:
            return await handle(_JSONRequest(request.scope, request.receive, parsing))

        return handle_json


class _JSONRequest(Request):
    def __init__(self, scope: Scope, receive: Receive, parsing: asyncio.Semaphore) -> None:
        super().__init__(scope, receive)
        self._parsing = parsing

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            if len(body) < LONG_BODY:
                return await super().json()
            async with self._parsing:
                self._json = await asyncio.to_thread(orjson.loads, body)
        return self._json
