"""Check every request before any route does: API keys, body size, admission. Also echoes the
request id and counts responses."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dovetail.errors import ConfigError, DovetailError
from dovetail_server_openai import failures
from dovetail_server_openai.metrics import Metrics
from dovetail_server_openai.options import ServerOptions

OPEN = frozenset({"/health", "/ping", "/live", "/version"})
"""Paths that need no API key, because load balancers request them."""
METRICS = "/metrics"
ADMITTED = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Paths whose requests are rejected before their bodies are read if the engine accepts no
requests."""
KEY_VARIABLE = "DOVETAIL_API_KEY"
NO_KEY: dict[str, list[str]] = {"security": []}
"""`openapi_extra` of a plugin's route that needs no API key, in OpenAPI's terms. All other routes
need one."""
SALT = "dovetail_cache_salt"
"""Key in the ASGI scope for the salt that separates the prefix caches of different API keys."""


def api_keys(options: ServerOptions, environ: MutableMapping[str, str] = os.environ) -> list[bytes]:
    """Return all accepted keys: from the options, from their file, and from the environment. The
    key is removed from the environment, so that no child process inherits it. Raises `ConfigError`
    for an empty key or file."""
    keys = [] if options.api_key is None else [options.api_key.get_secret_value()]
    if (key := environ.pop(KEY_VARIABLE, None)) is not None:
        keys.append(key)
    if options.api_key_file is not None:
        try:
            lines = Path(options.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(
                f"server.api_key_file: {options.api_key_file} cannot be read: {e}"
            ) from None
        from_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not from_file:
            raise ConfigError(f"server.api_key_file: {options.api_key_file} contains no key")
        keys += from_file
    if any(not key.strip() for key in keys):
        raise ConfigError(
            f"server.api_key, or {KEY_VARIABLE}, is empty: leave it out to serve without one"
        )
    return [key.encode() for key in keys]


class Guard:
    """ASGI middleware that rejects requests before they reach a route.

    `routes` is searched for routes that need no key. A request without a matching route needs a key
    too. `admit` raises a `DovetailError` if the engine accepts no requests now.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServerOptions,
        keys: Sequence[bytes],
        routes: Sequence[BaseRoute],
        admit: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._keys = keys
        self._admit = admit
        self._metrics = metrics
        self._salts = {
            key: hashlib.sha256(b"dovetail prefix cache " + key).hexdigest()[:16]
            for key in self._keys
        }
        self._open = OPEN | ({METRICS} if options.open_metrics else set())
        self._routes = [
            r
            for r in routes
            if isinstance(r, Route) and getattr(r, "openapi_extra", None) == NO_KEY
        ]
        self._max_body = int(options.max_body_mb * 2**20)
        self._too_large = f"the body is larger than {self._max_body} bytes (max_body_mb)"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id: bytes | None = headers.get(b"x-request-id")
        num_received = 0

        async def limited_receive() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._max_body:  # a body without Content-Length
                raise HTTPException(413, self._too_large)
            return message

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_response(scope, message["status"])
                if request_id is not None:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id[:200])]
            await send(message)

        app = self._rejection(scope, headers) or self._app
        await app(scope, limited_receive, counting_send)

    def _rejection(self, scope: Scope, headers: dict[bytes, bytes]) -> ASGIApp | None:
        if self._keys and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            given = given.strip()
            matching = [key for key in self._keys if hmac.compare_digest(given, key)]
            if matching and scheme.lower() == b"bearer":
                scope[SALT] = self._salts[matching[0]]
            elif not self._is_open(scope):
                return failures.error_response(
                    "missing or invalid API key: send Authorization: Bearer KEY",
                    401,
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._max_body:
            return failures.error_response(self._too_large, 413)
        if scope["method"] == "POST" and scope["path"] in ADMITTED:
            try:
                self._admit()
            except DovetailError as e:
                return failures.dovetail_error(e)
        return None

    def _is_open(self, scope: Scope) -> bool:
        return scope["path"] in self._open or any(
            r.matches(scope)[0] is Match.FULL for r in self._routes
        )
