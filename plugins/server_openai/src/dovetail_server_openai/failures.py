"""Every error in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

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
from dovetail_server_openai.streams import ClientGone

log = logging.getLogger("dovetail.server")


class Responsible(Protocol):
    """Names the plugin whose route failed; empty if that cannot be told."""

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
    """What every error's body is, in the published schema."""

    error: ErrorInfo


MAX_MESSAGE = 1000
_UNION_ARM = re.compile(r"(list|dict|function-.*)\[.*\]|str|int")
"""A part of an error's path that names a type, not a field."""


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
    own = {"Retry-After": str(_spread(retry_after or 1.0))} if status in (429, 503) else {}
    return JSONResponse(error_body(message, status, param), status, {**own, **(headers or {})})


def dovetail_error(error: DovetailError) -> JSONResponse:
    return error_response(
        error.message, error.http_status, error.param, retry_after=error.retry_after
    )


def _spread(seconds: float) -> int:
    """Whole seconds, up to half as many again: clients that were refused together do not come back
    together."""
    return math.ceil(seconds * random.uniform(1, 1.5))


def install(app: FastAPI, responsible: Responsible | None = None) -> None:
    """Answer every exception in this shape; `responsible` names the plugin whose route raised
    it."""

    @app.exception_handler(DovetailError)
    async def ours(request: Request, error: DovetailError) -> JSONResponse:
        if error.http_status == 500:  # 503 is said once, by who knows why
            log.error("%s: %s", type(error).__name__, error.message)
        return dovetail_error(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"][1:] if not _UNION_ARM.fullmatch(str(p)))
        if first["type"] == "json_invalid":
            return error_response(f"the body is no JSON: {first['ctx']['error']}", 400)
        return error_response(
            f"{path + ': ' if path else ''}{first['msg']}", 400, path.split(".")[0] or None
        )

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(str(error.detail), error.status_code, headers=error.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it; nginx's number, for whoever counts

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        # The traceback goes to the log: the framework raises it again.
        who = ""
        if responsible is not None:
            # What a route returned is looked at when it has ended: then only its module says whose
            # it was.
            module = getattr(request.scope.get("endpoint"), "__module__", "")
            who = responsible(error, module=module)
        what = f"{who}: {type(error).__name__}" if who else "internal error"
        return error_response(f"{what}; the server's log has the details", 500)
