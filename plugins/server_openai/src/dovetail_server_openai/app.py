"""The FastAPI application: routes, the guard in front of them, and nothing that computes."""

from __future__ import annotations

import hmac
import json
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dovetail import __version__
from dovetail.errors import InvalidRequest, ModelNotFound
from dovetail.serving import AsyncEngine
from dovetail_server_openai import ServerOptions, failures
from dovetail_server_openai.metrics import Metrics
from dovetail_server_openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dovetail_server_openai.routes import Completions

STREAM = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": failures.TYPES[code]} for code in (400, 401, 404, 413, 429, 500, 503)
}


def make_app(engine: AsyncEngine, options: ServerOptions) -> FastAPI:
    """All routes for one engine. The engine may still be loading: those that need it then answer 503."""
    app = FastAPI(title="Dovetail", version=__version__, responses=ERRORS)
    metrics = Metrics(engine, options.metrics_prefix)
    completions = Completions(engine, metrics, options, sampling_defaults(Path(engine.plan.folder)))
    failures.install(app)
    created = int(time.time())

    @app.post("/v1/completions", responses=STREAM, response_model=None)
    async def complete(body: CompletionRequest, http: Request) -> Response:
        return await completions.completions(body, http)

    @app.post("/v1/chat/completions", responses=STREAM, response_model=None)
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await completions.chat(body, http)

    def card() -> dict[str, Any]:
        plan = engine.plan
        return {
            "id": plan.served_model_name, "object": "model", "created": created, "owned_by": "dovetail",
            "root": plan.model, "parent": None, "max_model_len": plan.max_model_len,
        }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != engine.plan.served_model_name:
            raise ModelNotFound(f"the model {name!r} is not served here; {engine.plan.served_model_name!r} is")
        return card()

    @app.get("/health", response_model=None)
    @app.get("/ping", include_in_schema=False, response_model=None)
    async def health() -> Response:
        if engine.state == "ready":
            return Response()
        return failures.error_response(f"the engine is {engine.state}", 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__, "plan": engine.plan.fingerprint}

    @app.get("/metrics")
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        completions.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        tokenizer = engine.tokenizer
        if body.messages is not None:
            text = tokenizer.apply_chat_template(
                [m.as_dict() for m in body.messages], add_generation_prompt=body.add_generation_prompt
            )
        else:
            text = body.prompt or ""
        special = body.add_special_tokens if body.add_special_tokens is not None else body.messages is None
        tokens = tokenizer.encode(text, add_special_tokens=special)
        strings = [tokenizer.token_text(t) for t in tokens] if body.return_token_strs else None
        return {"count": len(tokens), "max_model_len": engine.plan.max_model_len, "tokens": tokens, "token_strs": strings}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        completions.check_model(body.model)
        if not all(0 <= t < engine.maker.model.vocab_size for t in body.tokens):
            raise InvalidRequest(f"token ids are from 0 to {engine.maker.model.vocab_size - 1}", param="tokens")
        return {"prompt": engine.tokenizer.decode(body.tokens, skip_special_tokens=False)}

    app.add_middleware(Guard, options=options)
    return app


class Guard:
    """Before any route: the API key, the size of the body, and the request id that is echoed."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._key = options.api_key.get_secret_value().encode() if options.api_key is not None else None
        self._max_body = int(options.max_body_mb * 2**20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise TooLarge
            return message

        request_id = headers.get(b"x-request-id")

        async def echoing(message: Message) -> None:
            if message["type"] == "http.response.start" and request_id is not None:
                message["headers"] = [*message["headers"], (b"x-request-id", request_id[:200])]
            await send(message)

        try:
            await self._app(scope, bounded, echoing)
        except TooLarge:
            await self._too_large()(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> JSONResponse | None:
        if self._key is not None and scope["path"].startswith("/v1") and scope["method"] != "OPTIONS":
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self._key):
                return failures.error_response("give the API key: Authorization: Bearer …", 401)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            return self._too_large()
        return None

    def _too_large(self) -> JSONResponse:
        return failures.error_response(f"the body is larger than {self._max_body} bytes (max_body_mb)", 413)


class TooLarge(Exception):
    """A body without a length, or with a false one, went over the limit."""


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """What the model's generation_config.json says of sampling; a request overrides it."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("do_sample") is False:
        return {}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {n: config[n] for n in names if isinstance(config.get(n), int | float)}
