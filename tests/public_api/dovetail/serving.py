from __future__ import annotations
import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal
import msgspec
from dovetail import wire
from dovetail.config import EngineConfig
from dovetail.errors import ERRORS, DovetailError, EngineDead, EngineUnavailable, InvalidRequest, Overloaded, PluginError
from dovetail.facts import model_facts
from dovetail.frontend.outputs import Delta, RequestState
from dovetail.frontend.requests import Prompt, RequestMaker
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.interfaces.worker import Progress
from dovetail.plan import Plan
from dovetail.resolution import resolve
from dovetail.shadow import ShadowReport
from dovetail.types import EngineStats, Request, SamplingParams, SequenceOutput
from dovetail.weights import LayerWeights
log = logging.getLogger('dovetail')
State = Literal['loading', 'ready', 'restarting', 'draining', 'closed']
MAX_BACKOFF = 30.0
START_PATIENCE = 60.0
SLOW = 1.0
CLOSE_PATIENCE = 5.0

class AsyncEngine:

    def __init__(self, config: EngineConfig, *, server: bool=False, progress: Progress | None=None) -> None:
        ...

    @property
    def num_live(self) -> int:
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

    def reset_prefix_cache(self) -> None:
        ...

    async def drain(self, patience: float) -> bool:
        ...

    async def close(self) -> None:
        ...
