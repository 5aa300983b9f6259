"""Every error in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dovetail.errors import DovetailError

log = logging.getLogger("dovetail.server")

TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 405: "MethodNotAllowedError",
    413: "BadRequestError", 429: "RateLimitError", 500: "InternalServerError", 503: "ServiceUnavailableError",
}  # fmt: skip
MAX_MESSAGE = 1000
_UNION_ARMS = ("list[", "str", "int", "function")
"""Parts of an error's path that name a type, not a field."""


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + " …"
    return {"error": {"message": message, "type": TYPES.get(status, "InternalServerError"), "param": param, "code": status}}


def error_response(message: str, status: int, param: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    return JSONResponse(error_body(message, status, param), status, headers)


def install(app: FastAPI) -> None:
    """Answer every exception in this shape."""

    @app.exception_handler(DovetailError)
    async def ours(request: Request, error: DovetailError) -> JSONResponse:
        if error.http_status >= 500:
            log.error("%s: %s", type(error).__name__, error.message)
        return error_response(error.message, error.http_status, error.param)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"][1:] if not str(p).startswith(_UNION_ARMS))
        return error_response(f"{path + ': ' if path else ''}{first['msg']}", 400, path.split(".")[0] or None)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(str(error.detail), error.status_code)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.exception("unforeseen error", exc_info=error)
        return error_response("internal error; the server's log has the details", 500)
