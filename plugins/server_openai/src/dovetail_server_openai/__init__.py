"""Register the OpenAI-compatible server. FastAPI and uvicorn are imported only when the server is
built."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dovetail.plugin.extension_points import ExtensionPoint
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Provider
from dovetail_server_openai.options import ServerOptions

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from dovetail_server_openai.server import OpenAIServer


ROUTES = ExtensionPoint(
    "routes",
    "dovetail_routes",
    "additional HTTP routes of the server",
    within="server",
    many=True,
    contract_class="dovetail_server_openai.testing:RoutesContract",
    scaffold="dovetail_server_openai:scaffold/routes",
)


def _server(context: BuildContext, options: ServerOptions) -> OpenAIServer:
    from dovetail_server_openai.server import OpenAIServer

    return OpenAIServer(
        options, context.build_all("routes"), partial(context.responsible, extension_point="routes")
    )


@hookimpl
def dovetail_extension_points() -> list[ExtensionPoint]:
    """Return the `routes` extension point. A provider's `build` returns a function that takes an
    `EngineClient` and returns a `fastapi.APIRouter`."""
    return [ROUTES]


@hookimpl
def dovetail_servers() -> list[Provider[OpenAIServer]]:
    return [
        Provider(
            "openai",
            "the OpenAI HTTP API, with vLLM's extra parameters",
            _server,
            ServerOptions,
            priority=50,
        )
    ]
