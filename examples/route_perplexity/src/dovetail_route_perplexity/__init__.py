"""An example plugin: `POST /v1/perplexity` says how surprising a text is to the model that is
served."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from fastapi import APIRouter

    from dovetail.interfaces.server import EngineClient


def build(context: Any, options: Options) -> Callable[[EngineClient], APIRouter]:
    from dovetail_route_perplexity.route import make_router

    return make_router


PROVIDER = Provider(
    "perplexity", "POST /v1/perplexity: how surprising a text is to the model", build
)


# The hook is the server's own: where that is not installed it does not exist, and that is no
# mistake.
@hookimpl(optionalhook=True)
def dovetail_routes() -> list[Provider[Callable[[EngineClient], APIRouter]]]:
    return [PROVIDER]
