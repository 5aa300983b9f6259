"""A server: takes requests from outside and gives them to an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Literal, Protocol

from dovetail.frontend.outputs import Delta
from dovetail.frontend.requests import Prompt, RequestMaker
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.weights import LayerWeights
from dovetail.plan import Plan
from dovetail.types import EngineStats, Request, SamplingParams

EngineState = Literal["loading", "ready", "restarting", "draining", "failed", "closed"]


class EngineClient(Protocol):
    """The engine, as a server sees it: it runs in a process of its own. All methods belong to one
    asyncio event loop."""

    failed: asyncio.Event
    """Set when the engine has been given up: `failure` says why, and no request will be served any
    more."""
    failure: str

    @property
    def plan(self) -> Plan: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def maker(self) -> RequestMaker:
        """Makes requests of prompts; raises `InvalidRequest`."""

    @property
    def state(self) -> EngineState: ...

    @property
    def stats(self) -> EngineStats:
        """As of the last step."""

    @property
    def invoked(self) -> Mapping[str, bool]:
        """By key of the plan: whether the part has been seen at work. See `Plan.report`."""

    @property
    def shadow(self) -> ShadowReport | None:
        """Of a shadow run: what it has shown since the process began."""

    @property
    def weights(self) -> list[LayerWeights]:
        """Of the linear layers, once they are loaded, if some are quantized."""

    @property
    def num_live(self) -> int:
        """Requests in flight."""

    @property
    def num_restarts(self) -> int: ...

    @property
    def pid(self) -> int | None:
        """Of the engine process."""

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises what kept it from starting."""

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
    ) -> AsyncGenerator[Delta]:
        """Complete a prompt. Yields the new output of its samples; a slow reader gets it merged.

        Raises `InvalidRequest`, `EngineUnavailable`, `Overloaded` before the first delta,
        `EngineDead` or `StepFailed` at any time. Leaving the iterator early (a client that
        disconnects) aborts the request.
        """

    def run(self, request: Request) -> AsyncGenerator[Delta]:
        """`generate`, for a request that `maker` has made."""

    def check_ready(self) -> None:
        """Raise `EngineUnavailable`, saying why, unless requests are taken now."""

    def check_admission(self) -> None:
        """Raise `EngineUnavailable`, or `Overloaded`, unless one more request would be taken
        now."""

    def reset_prefix_cache(self) -> None:
        """Find nothing of what has been computed so far, from the next request on. Raises
        `EngineUnavailable`."""

    async def drain(self, patience: float) -> bool:
        """Take no more requests, and wait up to `patience` seconds for those in flight. True if all
        have ended."""

    async def close(self) -> None:
        """Stop the process. Requests in flight get `EngineUnavailable`. Idempotent."""


class Server(Protocol):
    """What a server provider builds."""

    def run(
        self, engine: EngineClient, host: str, port: int, on_ready: Callable[[str], None]
    ) -> None:
        """Serve until SIGINT or SIGTERM, drain, and return.

        Starts the engine itself, inside its event loop, answers 503 until that is ready, and then
        calls `on_ready` with the base URL. Raises what kept the engine from starting, or
        `ConfigError` if the address is taken.
        """
