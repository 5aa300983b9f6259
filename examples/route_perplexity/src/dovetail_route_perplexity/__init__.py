"""An example plugin: `POST /v1/perplexity` returns the perplexity of a text under the served
model."""

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
    "perplexity", "POST /v1/perplexity: the perplexity of a text under the model", build
)


# The server plugin defines this hook. Without that plugin the hook does not exist, which is not an
# error.
@hookimpl(optionalhook=True)
def dovetail_routes() -> list[Provider[Callable[[EngineClient], APIRouter]]]:
    return [PROVIDER]
