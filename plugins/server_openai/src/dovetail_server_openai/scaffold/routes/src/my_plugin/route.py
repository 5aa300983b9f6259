"""Count the tokens of a text. The server answers invalid bodies and errors raised by the engine as
for its own routes.

Try it:

    curl localhost:8000/v1/my-plugin -H 'content-type: application/json' \\
        -d '{"text": "import os"}'
"""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from dovetail.interfaces.server import EngineClient


class Body(BaseModel):
    text: str = Field(max_length=1_000_000)  # bounded before any work is done


class Answer(BaseModel):
    num_tokens: int


def make_router(engine: EngineClient) -> APIRouter:
    """Return the router. The engine also has `generate`, for routes that use the model, `plan` and
    `stats`."""
    router = APIRouter()

    @router.post("/v1/my-plugin")
    async def count(body: Body) -> Answer:
        return Answer(num_tokens=len(engine.tokenizer.encode(body.text, add_special_tokens=False)))

    return router
