"""A route of the OpenAI server: the hook, and what this package offers. Nothing heavy here: FastAPI
comes with the route."""

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
    """Called in the front-end process. What it returns is called once, with the engine that is
    served."""
    from my_plugin.route import make_router

    return make_router


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "POST /v1/my-plugin: how many tokens a text has",
    build,
    Options,  # none of its own
)


# The hook is the server's own: where that is not installed the hook does not exist, and that is no
# mistake.
@hookimpl(optionalhook=True)
def dovetail_routes() -> list[Provider[Callable[[EngineClient], APIRouter]]]:
    return [PROVIDER]
