"""Test the contract of the `routes` extension point. A plugin's test is a subclass:

class TestMyRoutes(RoutesContract):
    provider = PROVIDER
    requests = (("POST", "/v1/mine", {"text": "hello"}),)
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fastapi import APIRouter, FastAPI
from starlette.routing import Route

from dovetail.plugin.config import EngineConfig
from dovetail.plugin.extension_points import ExtensionPoint
from dovetail.runtime.serving import AsyncEngine
from dovetail_server_openai import ROUTES
from dovetail_server_openai.app import make_app
from dovetail_server_openai.options import ServerOptions
from dovetail_testing.contract import Contract, common_causes
from dovetail_testing.plugin import SIMULATED, install, make_model

COMPLETION = (
    "POST",
    "/v1/completions",
    {"model": "kit", "prompt": "abc", "max_tokens": 3, "seed": 1},
)
OWN = ("/v1/models", "/health", "/metrics")
BAD_BODIES: tuple[Any, ...] = ({}, [], "text", {"text": None}, {"": [1]})


class RoutesContract(Contract):
    """The tests of a `routes` provider: subclass and set `provider`. The engine is a real one with
    the simulated worker."""

    extension_point = "routes"
    added: ClassVar[tuple[ExtensionPoint, ...]] = (ROUTES,)
    requests: ClassVar[tuple[tuple[str, str, Any], ...]] = ()
    """Requests as (method, path, JSON body or None) that must get a 2xx response."""

    def prepare(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dovetail-"))

    def teardown_method(self) -> None:
        shutil.rmtree(self.folder)

    @common_causes(
        "`build` returns a router instead of a function that takes the engine and returns a router"
    )
    def test_a_router_is_made(self) -> None:
        """The function returned by `build`, called with an engine, returns a `fastapi.APIRouter`
        with at least one route."""

        async def check(app: FastAPI, router: APIRouter) -> None:
            assert router.routes, "the router has no routes"

        self.with_app(check)

    @common_causes(
        "a path that the server already has", "a path parameter at the root that matches everything"
    )
    def test_the_servers_own_routes_stay(self) -> None:
        """No route of the server is replaced or hidden."""

        async def compare(app: FastAPI, router: APIRouter) -> None:
            for method, path, body in (COMPLETION, *(("GET", path, None) for path in OWN)):
                status, answer = await call(app, method, path, body)
                assert status == 200, (
                    f"{method} {path} answers {status} with this router: {answer[:300]!r}"
                )
            status, _ = await call(app, "GET", "/no/such/route", None)
            assert status in (404, 405), f"GET /no/such/route answers {status} with this router"

        self.with_app(compare)

    @common_causes("the route catches an exception of the engine and answers 200")
    def test_what_it_promises(self) -> None:
        """The requests in `requests` get a 2xx response."""
        if not self.requests:
            pytest.skip("`requests` is empty")

        async def send(app: FastAPI, router: APIRouter) -> None:
            for method, path, body in self.requests:
                status, answer = await call(app, method, path, body)
                assert 200 <= status < 300, (
                    f"{method} {path} with {body!r} answers {status}: {answer[:300]!r}"
                )

        self.with_app(send)

    @common_causes(
        "the body is used without validation", "work is done before the body is validated"
    )
    def test_bad_bodies_hurt_nobody(self) -> None:
        """The routes answer any body, and responses to other requests do not change."""

        async def send(app: FastAPI, router: APIRouter) -> None:
            before = await call(app, *COMPLETION)
            for route in router.routes:
                assert isinstance(route, Route)
                for body in BAD_BODIES:
                    status, _ = await call(
                        app, next(iter(route.methods or {"GET"})), route.path, body
                    )
                    assert 100 < status < 600
            assert _text(await call(app, *COMPLETION)) == _text(before), (
                "the response to another request changed"
            )

        self.with_app(send)

    def with_app(self, use: Callable[[FastAPI, APIRouter], Awaitable[None]]) -> None:
        """Call `use` with the server's application, which includes this router, and with the
        router. A running engine is behind it."""
        site = self.folder / "site"
        install(site)
        model = make_model(self.folder / "model")

        async def run() -> None:
            config = {"model": str(model), "served_model_name": "kit", "device": "cpu", **SIMULATED}
            engine = AsyncEngine(EngineConfig.model_validate(config))
            routers: list[APIRouter] = []

            def make_router(engine: AsyncEngine) -> APIRouter:
                routers.append(self.build()(engine))
                return routers[0]

            await engine.start()
            try:
                app = make_app(
                    engine, ServerOptions.model_validate({}), {self.provider.name: make_router}
                )
                await use(app, routers[0])
            finally:
                await engine.close()

        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(site))
            patch.setenv("PYTHONPATH", str(site), prepend=":")
            try:
                asyncio.run(run())
            finally:
                sys.path_importer_cache.pop(str(site), None)


def _text(answer: tuple[int, bytes]) -> Any:
    return answer[0], [choice["text"] for choice in json.loads(answer[1])["choices"]]


async def call(app: FastAPI, method: str, path: str, body: Any) -> tuple[int, bytes]:
    """Send one request to an ASGI application in-process. Returns (status, body). An exception of
    the application counts as a 500."""
    data = b"" if body is None else json.dumps(body).encode()
    headers = [
        (b"host", b"kit"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("kit", 1),
        "server": ("kit", 80),
    }
    sent: list[dict[str, Any]] = []
    pending = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Any:
        return pending.pop() if pending else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    try:
        await app(scope, receive, send)
    except Exception as e:
        return 500, repr(e).encode()
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])
