"""Define the server, which accepts requests from outside and passes them to an engine."""

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
    """The engine as a server sees it; it runs in a process of its own. Call all methods on one
    asyncio event loop."""

    failed: asyncio.Event
    """Set when the engine has failed for good: `failure` has the reason, and no more requests are
    served."""
    failure: str

    @property
    def plan(self) -> Plan: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def maker(self) -> RequestMaker:
        """Builds requests from prompts; raises `InvalidRequest`."""

    @property
    def state(self) -> EngineState: ...

    @property
    def stats(self) -> EngineStats:
        """Stats as of the last step."""

    @property
    def invoked(self) -> Mapping[str, bool]:
        """Whether each provider has been invoked, by plan key. See `Plan.report`."""

    @property
    def shadow(self) -> ShadowReport | None:
        """Results of a shadow run since the engine process started, or None."""

    @property
    def weights(self) -> list[LayerWeights]:
        """The linear layers, once they are loaded, if some are quantized."""

    @property
    def num_live(self) -> int:
        """Number of requests in flight."""

    @property
    def num_restarts(self) -> int: ...

    @property
    def pid(self) -> int | None:
        """Process id of the engine process."""

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises the error that prevents the
        start."""

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
        """Complete a prompt. Yields the new output of its samples; for a slow reader outputs are
        merged.

        Raises `InvalidRequest`, `EngineUnavailable` or `Overloaded` before the first delta, and
        `EngineDead` or `StepFailed` at any time. Closing the iterator early (a client that
        disconnects) aborts the request.
        """

    def run(self, request: Request) -> AsyncGenerator[Delta]:
        """Do what `generate` does, for a request that `maker` has built."""

    def check_ready(self) -> None:
        """Raise `EngineUnavailable`, with the reason, unless requests are accepted now."""

    def check_admission(self) -> None:
        """Raise `EngineUnavailable` or `Overloaded` unless one more request would be accepted
        now."""

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache, with effect from the next request. Raises
        `EngineUnavailable`."""

    async def drain(self, patience: float) -> bool:
        """Accept no more requests, and wait up to `patience` seconds for those in flight. Returns
        True if all have ended."""

    async def close(self) -> None:
        """Stop the process. Requests in flight get `EngineUnavailable`. Calling it again has no
        effect."""


class Server(Protocol):
    """The object that a server provider builds."""

    def run(
        self, engine: EngineClient, host: str, port: int, on_ready: Callable[[str], None]
    ) -> None:
        """Serve until SIGINT or SIGTERM, drain, and return.

        Starts the engine inside its event loop, answers 503 until it is ready, and then calls
        `on_ready` with the base URL. Raises the error that prevents the engine's start, or
        `ConfigError` if the address is in use.
        """
