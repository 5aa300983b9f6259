"""Build the FastAPI application: the routes and the guard in front of them. Nothing here
computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.routing import Route

from dovetail import __version__
from dovetail.errors import ModelNotFound, PluginError
from dovetail.frontend.requests import sampling_defaults
from dovetail.interfaces.server import EngineClient
from dovetail.interfaces.weights import alike
from dovetail_server_openai import failures
from dovetail_server_openai.bodies import JSONRoute
from dovetail_server_openai.guard import Guard
from dovetail_server_openai.metrics import Metrics
from dovetail_server_openai.options import ServerOptions
from dovetail_server_openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from dovetail_server_openai.routes import Completions

TOKENIZER_KEYS = (
    "tokenizer_class",
    "model_max_length",
    "add_bos_token",
    "add_eos_token",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
)
"""Fields of tokenizer_config.json that clients may see. The other fields can contain anything,
secrets included."""
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "model": failures.ErrorBody}
    for code, text in failures.TYPES.items()
}
EMPTY: dict[int | str, dict[str, Any]] = {200: {"description": "No content"}}


MakeRouter = Callable[[EngineClient], APIRouter]
"""The type that providers of the `routes` extension point build."""


def make_app(
    engine: EngineClient,
    options: ServerOptions,
    routes: Mapping[str, MakeRouter] | None = None,
    responsible: failures.Responsible | None = None,
    keys: Sequence[bytes] = (),
) -> FastAPI:
    """Return the application for one engine. While the engine is loading, routes that need it
    answer 503.

    `routes` are the routers of other plugins by provider name, `responsible` names the plugin whose
    route failed, and `keys` are the API keys. Raises `PluginError` if a router cannot be built, or
    if one of its routes already exists.
    """
    app = FastAPI(title="Dovetail", version=__version__, responses=ERRORS)
    app.router.route_class = JSONRoute
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    metrics = Metrics(engine, options.metrics_prefix)
    completions = Completions(engine, metrics, options, sampling_defaults(Path(engine.plan.folder)))
    failures.install(app, responsible)
    created, fingerprint = int(time.time()), engine.plan.fingerprint

    @app.post("/v1/completions", responses=STREAM, response_model=None)
    async def complete(body: CompletionRequest, http: Request) -> Response:
        return await completions.completions(body, http)

    @app.post("/v1/chat/completions", responses=STREAM, response_model=None)
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await completions.chat(body, http)

    def card() -> dict[str, Any]:
        plan = engine.plan
        return {
            "id": plan.served_model_name,
            "object": "model",
            "created": created,
            "owned_by": "dovetail",
            "root": plan.model,
            "parent": None,
            "max_model_len": plan.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != engine.plan.served_model_name:
            raise ModelNotFound(
                f"the model {name!r} does not exist; this server has"
                f" {engine.plan.served_model_name!r}"
            )
        return card()

    @app.get("/health", response_class=Response, responses=EMPTY)
    @app.get("/ping", include_in_schema=False, response_class=Response)
    async def health() -> Response:
        if engine.state == "ready":
            return Response()
        return failures.error_response(f"the engine is {engine.state}", 503)

    @app.get("/live", response_class=Response, responses=EMPTY)
    async def live() -> Response:
        """Return 200 unless the engine has failed for good or is closed. Loading, restarting and
        draining count as alive."""
        if engine.state not in ("failed", "closed"):
            return Response()
        return failures.error_response(f"the engine is {engine.state}", 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__, "plan": fingerprint}

    @app.get("/v1/dovetail/plan")
    async def plan() -> dict[str, Any]:
        weights = {"weights": msgspec.to_builtins(alike(engine.weights))} if engine.weights else {}
        return engine.plan.report(engine.invoked | {"server": True}) | weights

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/load")
    async def load() -> dict[str, int]:
        return {"server_load": engine.num_live}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        t = engine.tokenizer
        shown = {key: t.config[key] for key in TOKENIZER_KEYS if key in t.config}
        return {**shown, **t.special_tokens, "chat_template": t.chat_template}

    @app.post("/reset_prefix_cache", response_class=Response, responses=EMPTY)
    async def reset_prefix_cache() -> Response:
        engine.reset_prefix_cache()
        return Response()

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        return await completions.tokenize(body)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        return await completions.detokenize(body)

    for name, make_router in (routes or {}).items():
        _add_routes(app, name, make_router, engine)
    app.add_middleware(
        Guard,
        options=options,
        keys=keys,
        routes=app.routes,
        admit=engine.check_admission,
        metrics=metrics,
    )
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's schema without status 422: this server answers invalid bodies with 400 and
    the common error body."""
    schema = FastAPI.openapi(app)
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
    return schema


def _add_routes(app: FastAPI, name: str, make_router: MakeRouter, engine: EngineClient) -> None:
    try:
        router = make_router(engine)
    except Exception as e:
        raise PluginError(
            f"routes: {name} could not be built: {type(e).__name__}: {e}", provider=name
        ) from e
    if not isinstance(router, APIRouter):
        raise PluginError(
            f"routes: {name} built a {type(router).__name__}, not a fastapi.APIRouter",
            provider=name,
        )
    existing = {(m, r.path) for r in app.routes if isinstance(r, Route) for m in r.methods or ()}
    for route in router.routes:
        if isinstance(route, Route) and (
            conflicts := [m for m in route.methods or () if (m, route.path) in existing]
        ):
            raise PluginError(
                f"routes: {name} defines {conflicts[0]} {route.path}, which already exists",
                provider=name,
            )
    app.include_router(router)
