from __future__ import annotations
import asyncio
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit
import pytest
from dovetail.assembly.compose import PlanContext
from dovetail.facts import device_facts, model_facts
from dovetail.plugin.config import EngineConfig
from dovetail.plugin.discovery import load_registry
from dovetail.plugin.provider import Provider
from dovetail.runtime.serving import AsyncEngine
from dovetail.types import SamplingParams
from dovetail_testing.contract import Contract, common_causes
from dovetail_testing.plugin import SIMULATED, install, make_model
PATIENCE = 30
LOOPBACK = '127.0.0.1'

@dataclass
class Running:
    process: BaseProcess
    reports: Connection
    patience: float

    def next(self) -> tuple[str, str]:
        ...

    def expect(self, wanted: str) -> str:
        ...

    def signal(self, number: int) -> None:
        ...

class ServerContract(Contract):
    extension_point = 'server'
    patience: ClassVar[float] = PATIENCE
    folder: ClassVar[Path]
    running: list[Running]

    def prepare(self) -> None:
        ...

    def teardown_method(self) -> None:
        ...

    @classmethod
    def teardown_class(cls) -> None:
        ...

    @pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=['SIGTERM', 'SIGINT'])
    @common_causes('a signal handler is replaced by the one of the server library', 'the engine is left open at the end')
    def test_it_serves_until_told_to_stop(self, number: int) -> None:
        ...

    @common_causes('signals are handled only after the start')
    def test_it_can_be_stopped_while_it_loads(self) -> None:
        ...

    @common_causes('the signal ends the serving loop itself', 'the engine is closed before it has drained')
    def test_requests_in_flight_are_finished(self) -> None:
        ...

    @common_causes('the library exits or logs a line instead of raising an error')
    def test_a_taken_address_is_an_error(self) -> None:
        ...

    @common_causes('the start is not awaited, so that its error is lost')
    def test_an_engine_that_does_not_start_is_an_error(self) -> None:
        ...

    def start(self, *, port: int=0, gone: str | None=None, ask: bool=False, **values: Any) -> Running:
        ...

def serve(reports: Connection, provider: Provider[Any], options: dict[str, Any], config: dict[str, Any], site: str, port: int, gone: str | None, ask: bool) -> None:
    ...

class Asking:

    def __init__(self, engine: AsyncEngine, reports: Connection) -> None:
        ...

    async def start(self) -> None:
        ...

def free_port() -> int:
    ...

def wait_for_port(port: int) -> None:
    ...
