"""Register a route of the OpenAI server. FastAPI is imported only with the route."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from fastapi import APIRouter

    from dovetail.interfaces.server import EngineClient
    from dovetail.plugin.build_context import BuildContext


def build(context: BuildContext, options: Options) -> Callable[[EngineClient], APIRouter]:
    """Return the function that makes the router. Called in the front-end process; the function is
    called once, with the engine."""
    from my_plugin.route import make_router

    return make_router


PROVIDER = Provider(
    "my-plugin",  # name in an engine config
    "POST /v1/my-plugin: count the tokens of a text",
    build,
    Options,  # no options
)


# The server plugin defines this hook. `optionalhook` allows this package to load without the
# server.
@hookimpl(optionalhook=True)
def dovetail_routes() -> list[Provider[Callable[[EngineClient], APIRouter]]]:
    return [PROVIDER]
