"""Mistakes that routes on the server make, beside the perplexity route of the examples."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request

from dovetail_route_perplexity import PROVIDER
from dovetail_route_perplexity.route import Body, make_router
from sabotage import Sabotages

SABOTAGES = Sabotages(
    "routes", PROVIDER, requests=(("POST", "/v1/perplexity", {"text": "import os"}),)
)
MADE, STAY, PROMISED, HURT = (
    "test_a_router_is_made",
    "test_the_servers_own_routes_stay",
    "test_what_it_promises",
    "test_bad_bodies_hurt_nobody",
)


def sabotage(*caught_by):
    """For functions (engine, router) → router, given the correct one."""

    def note(change):
        def build(context, options):
            return lambda engine: change(engine, make_router(engine))

        return SABOTAGES.add(change, caught_by, build=build)

    return note


@sabotage(STAY)
def takes_a_servers_route(engine, router):
    """It answers to a path of the server's own."""

    @router.get("/health")
    async def health() -> str:
        return "of course"

    return router


@sabotage(STAY)
def catches_all(engine, router):
    """A path parameter at the root matches everything."""

    @router.get("/{path:path}")
    async def anything(path: str) -> str:
        return path

    return router


@sabotage(PROMISED)
def raises_on_good_input(engine, router):
    """What it promises to answer makes it raise."""
    router = APIRouter()

    @router.post("/v1/perplexity")
    async def perplexity(body: Body) -> float:
        return 1 / (len(body.text) - len("import os"))

    return router


@sabotage(PROMISED)
def another_path(engine, router):
    """Its route is not where it says."""
    other = APIRouter(prefix="/api")
    other.include_router(router)
    return other


@sabotage(MADE)
def no_routes(engine, router):
    """The router has no routes."""
    return APIRouter()


@sabotage(MADE)
def an_application(engine, router):
    """An application is made, in place of a router."""
    app = FastAPI()
    app.include_router(router)
    return app


@sabotage(HURT)
def closes_the_engine(engine, router):
    """A body that it cannot read makes it drain the engine."""

    @router.post("/v1/other")
    async def other(request: Request) -> str:
        body = await request.json()
        if not isinstance(body, dict) or not body.get("text"):
            await engine.drain(0)
        return "done"

    return router


def router_at_once(context, options):
    """The provider builds a router, in place of what makes one for an engine."""
    return APIRouter()


SABOTAGES.add(router_at_once, (MADE,), build=router_at_once)
