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
EngineState = Literal['loading', 'ready', 'restarting', 'draining', 'failed', 'closed']

class EngineClient(Protocol):
    failed: asyncio.Event
    failure: str

    @property
    def plan(self) -> Plan:
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        ...

    @property
    def maker(self) -> RequestMaker:
        ...

    @property
    def state(self) -> EngineState:
        ...

    @property
    def stats(self) -> EngineStats:
        ...

    @property
    def invoked(self) -> Mapping[str, bool]:
        ...

    @property
    def shadow(self) -> ShadowReport | None:
        ...

    @property
    def weights(self) -> list[LayerWeights]:
        ...

    @property
    def num_live(self) -> int:
        ...

    @property
    def num_restarts(self) -> int:
        ...

    @property
    def pid(self) -> int | None:
        ...

    async def start(self) -> None:
        ...

    def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None=None, priority: int=0, cache_salt: str | None=None, add_special_tokens: bool=True) -> AsyncGenerator[Delta]:
        ...

    def run(self, request: Request) -> AsyncGenerator[Delta]:
        ...

    def check_ready(self) -> None:
        ...

    def check_admission(self) -> None:
        ...

    def reset_prefix_cache(self) -> None:
        ...

    async def drain(self, patience: float) -> bool:
        ...

    async def close(self) -> None:
        ...

class Server(Protocol):

    def run(self, engine: EngineClient, host: str, port: int, on_ready: Callable[[str], None]) -> None:
        ...
