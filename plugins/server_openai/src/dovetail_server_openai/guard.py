"""Before any route: API keys, the size of the body, admission, the request id that is echoed, and
the count of answers."""

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
"""Paths that need no API key: what a load balancer asks."""
METRICS = "/metrics"
ADMITTED = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Paths of requests for the engine: where it takes none, they are refused before their bodies are
read."""
KEY_VARIABLE = "DOVETAIL_API_KEY"
NO_KEY: dict[str, list[str]] = {"security": []}
"""`openapi_extra` of a plugin's route that needs no API key, in OpenAPI's own words. All others
need one."""
SALT = "dovetail_cache_salt"
"""In the scope: what the caller's prefixes are kept apart by."""


def api_keys(options: ServerOptions, environ: MutableMapping[str, str] = os.environ) -> list[bytes]:
    """All keys that are accepted: of the options, of their file, and of the environment, where the
    key is removed, so that no other process inherits it. Raises `ConfigError` for an empty key or
    file."""
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
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"server.api_key_file: {options.api_key_file} holds no key")
        keys += found
    if any(not key.strip() for key in keys):
        raise ConfigError(
            f"server.api_key, or {KEY_VARIABLE}, is empty: leave it out to serve without one"
        )
    return [key.encode() for key in keys]


class Guard:
    """ASGI middleware. `routes` are asked whether they are open: a request whose route is not known
    needs a key too. `admit` raises a `DovetailError` where the engine takes no request now."""

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

        async def bounded() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._max_body:  # a body that did not say how long it is
                raise HTTPException(413, self._too_large)
            return message

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(scope, message["status"])
                if request_id is not None:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id[:200])]
            await send(message)

        app = self._refusal(scope, headers) or self._app
        await app(scope, bounded, counting)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ASGIApp | None:
        if self._keys and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            given = given.strip()
            matching = [key for key in self._keys if hmac.compare_digest(given, key)]
            if matching and scheme.lower() == b"bearer":
                scope[SALT] = self._salts[matching[0]]
            elif not self._is_open(scope):
                return failures.error_response(
                    "give the API key: Authorization: Bearer …",
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
