"""Define the route. The server handles engine errors and invalid request bodies, as it does for its
own routes."""

from __future__ import annotations

import math

from fastapi import APIRouter
from pydantic import BaseModel

from dovetail import SamplingParams
from dovetail.interfaces.server import EngineClient


class Body(BaseModel):
    text: str


class Perplexity(BaseModel):
    perplexity: float
    num_tokens: int


def make_router(engine: EngineClient) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/perplexity")
    async def perplexity(body: Body) -> Perplexity:
        """Return exp of the mean negative log-probability of all tokens except the first."""
        logprobs: list[float] = []
        async for delta in engine.generate(
            body.text, SamplingParams(max_tokens=0, prompt_logprobs=0)
        ):
            logprobs += [position.logprobs[0] for position in delta.prompt_logprobs]
        mean = sum(logprobs) / len(logprobs) if logprobs else 0.0
        return Perplexity(perplexity=math.exp(-mean), num_tokens=len(logprobs) + 1)

    return router
