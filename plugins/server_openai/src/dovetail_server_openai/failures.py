"""Answer every error in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Mapping
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dovetail.errors import DovetailError
from dovetail_server_openai.streams import ClientDisconnected

log = logging.getLogger("dovetail.server")


class Responsible(Protocol):
    """Returns the name of the plugin whose route failed, or an empty string if it cannot be
    determined."""

    def __call__(self, error: BaseException, *, module: str = "") -> str: ...


TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "BadRequestError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """The body of every error response, for the OpenAPI schema."""

    error: ErrorInfo


MAX_MESSAGE = 1000
_UNION_ARM = re.compile(r"(list|dict|function-.*)\[.*\]|str|int")
"""Parts of an error's path that name a type, not a field."""


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + " …"
    return {
        "error": {
            "message": message,
            "type": TYPES.get(status, "InternalServerError"),
            "param": param,
            "code": status,
        }
    }


def error_response(
    message: str,
    status: int,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    retry_after: float | None = None,
) -> JSONResponse:
    retry = {"Retry-After": str(_with_jitter(retry_after or 1.0))} if status in (429, 503) else {}
    return JSONResponse(error_body(message, status, param), status, {**retry, **(headers or {})})


def dovetail_error(error: DovetailError) -> JSONResponse:
    return error_response(
        error.message, error.http_status, error.param, retry_after=error.retry_after
    )


def _with_jitter(seconds: float) -> int:
    """Return whole seconds with up to 50% of jitter, so that clients that were rejected together do
    not retry together."""
    return math.ceil(seconds * random.uniform(1, 1.5))


def install(app: FastAPI, responsible: Responsible | None = None) -> None:
    """Add exception handlers to `app`. `responsible` names the plugin whose route raised the
    exception."""

    @app.exception_handler(DovetailError)
    async def dovetail_failed(request: Request, error: DovetailError) -> JSONResponse:
        if error.http_status == 500:  # the component that causes a 503 logs it once
            log.error("%s: %s", type(error).__name__, error.message)
        return dovetail_error(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"][1:] if not _UNION_ARM.fullmatch(str(p)))
        if first["type"] == "json_invalid":
            return error_response(f"the body is not valid JSON: {first['ctx']['error']}", 400)
        return error_response(
            f"{path + ': ' if path else ''}{first['msg']}", 400, path.split(".")[0] or None
        )

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(str(error.detail), error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnected)
    async def disconnected(request: Request, error: ClientDisconnected) -> Response:
        return Response(status_code=499)  # nginx's status, for the metrics: no client reads it

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # The framework raises the exception again, and its traceback is logged.
        plugin = ""
        if responsible is not None:
            # FastAPI validates a route's return value after the route has ended, so that the
            # traceback does not contain the route; its module then identifies the plugin.
            module = getattr(request.scope.get("endpoint"), "__module__", "")
            plugin = responsible(error, module=module)
        cause = f"{plugin}: {type(error).__name__}" if plugin else "internal error"
        return error_response(f"{cause}; the server's log has the details", 500)
