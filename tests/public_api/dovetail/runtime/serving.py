from __future__ import annotations
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any
import msgspec
from dovetail.composition.resolution import resolve
from dovetail.errors import ERRORS, DovetailError, EngineDead, EngineUnavailable, InvalidRequest, Overloaded, PluginError
from dovetail.facts import model_facts
from dovetail.frontend.outputs import Delta, RequestState
from dovetail.frontend.requests import Prompt, RequestMaker
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.interfaces.server import EngineState
from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.weights import LayerWeights
from dovetail.interfaces.worker import Progress
from dovetail.plan import Plan
from dovetail.plugin.config import EngineConfig
from dovetail.runtime import wire
from dovetail.runtime.live import LiveRequest
from dovetail.runtime.restarts import MAX_RESTARTS, Restarts
from dovetail.types import EngineStats, Request, SamplingParams
log = logging.getLogger('dovetail')
START_PATIENCE = 60.0
STALL_FACTOR = 5
DUMP_SECONDS = 0.2
LAST_WORDS = 0.5
SLOW = 1.0
CLOSE_PATIENCE = 5.0

class AsyncEngine:

    def __init__(self, config: EngineConfig, *, server: bool=False, progress: Progress | None=None) -> None:
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

    async def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None=None, priority: int=0, cache_salt: str | None=None, add_special_tokens: bool=True) -> AsyncGenerator[Delta]:
        ...

    async def run(self, request: Request) -> AsyncGenerator[Delta]:
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
