"""Provide `AsyncEngine`, an engine in a supervised process of its own, for servers.

The front-end resolves the plan, starts the engine process, tokenizes, detokenizes and finds stop
strings; the engine process runs the loop. When the process dies or stalls, every request in flight
gets `EngineDead`, and a new process is started. Until it is ready, requests are rejected with
`EngineUnavailable`.
"""

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
from dovetail.errors import (
    ERRORS,
    DovetailError,
    EngineDead,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    PluginError,
)
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

log = logging.getLogger("dovetail")

START_PATIENCE = 60.0
"""Seconds for which a process may be silent until it is ready: imports block all of its threads."""
STALL_FACTOR = 5
"""A step counts as stalled after this many times its predicted duration, if that is longer than
`stall_timeout`."""
DUMP_SECONDS = 0.2
"""Seconds for a stalled process to write its stacks before it is killed."""
LAST_WORDS = 0.5
"""Seconds to read what a process sent before it ended."""
SLOW = 1.0
"""Duration of a step in seconds after which a warning is logged; doubled after each warning."""
CLOSE_PATIENCE = 5.0
"""Seconds for a process to end by itself."""


class _Stalled(EngineDead):
    """The process is alive but stalled, so its stacks are worth a look."""


class AsyncEngine:
    """An engine in a process of its own, for one asyncio event loop. Call `start`, then `generate`
    from any number of tasks, then `close`."""

    def __init__(
        self, config: EngineConfig, *, server: bool = False, progress: Progress | None = None
    ) -> None:
        """Resolve the plan and read the tokenizer. Raises `ConfigError`, `PluginError` or
        `CheckpointError`."""
        self.config = config
        self.plan: Plan = resolve(config, server=server)
        self.tokenizer = Tokenizer(Path(self.plan.folder))
        self.maker = RequestMaker(
            model_facts(Path(self.plan.folder)), self.plan.max_model_len, self.tokenizer
        )
        self.state: EngineState = "loading"
        self.stats = EngineStats()
        self.shadow: ShadowReport | None = None
        """Results of a shadow run since the engine process started, or None."""
        self.invoked: dict[str, bool] = {}
        """Whether each provider has been invoked, by plan key. See `Plan.report`."""
        self.weights: list[LayerWeights] = []
        """The linear layers, once they are loaded, if some are quantized. See
        `compose.weights_of`."""
        self._progress = progress
        self._live: dict[str, LiveRequest] = {}
        """Requests in flight, by `LiveRequest.engine_id`."""
        self._request_ids: set[str] = set()
        self._num_admitted = 0
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._num_heard = 0
        self._slow = SLOW
        self.failed = asyncio.Event()
        """Set when the engine has failed for good: `failure` has the reason, and no more requests
        are served."""
        self.failure = ""
        self._num_finished = 0
        self._restarts = Restarts()
        self._supervisor: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    @property
    def num_live(self) -> int:
        """Number of requests in flight."""
        return len(self._live)

    @property
    def num_restarts(self) -> int:
        return self._restarts.count

    @property
    def pid(self) -> int | None:
        """Process id of the engine process."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises the error that prevents the
        start."""
        self._started = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        await self._started

    async def generate(
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
        request = self.maker.make(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            add_special_tokens=add_special_tokens,
        )
        async with aclosing(self.run(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def run(self, request: Request) -> AsyncGenerator[Delta]:
        """Do what `generate` does, for a request that `maker` has built."""
        live = self._admit(request)
        try:
            while not live.state.finished:
                await live.changed.wait()
                live.changed.clear()
                for delta in live.deltas():
                    yield delta
                if live.error is not None and not live.state.finished:
                    raise live.error
        finally:
            self._num_finished += live.state.finished
            self._live.pop(live.engine_id, None)
            self._request_ids.discard(request.request_id)
            if not self._live:
                self._idle.set()
            live.close()

    def check_ready(self) -> None:
        """Raise `EngineUnavailable`, with the reason, unless requests are accepted now."""
        if self.state == "failed":
            raise EngineUnavailable(f"the engine has failed and is not restarted: {self.failure}")
        if self.state != "ready":
            wait = self._restarts.seconds_left if self.state in ("loading", "restarting") else None
            raise EngineUnavailable(f"the engine is {self.state}", retry_after=wait)

    def check_admission(self) -> None:
        """Raise `EngineUnavailable` or `Overloaded` unless one more request would be accepted
        now."""
        self.check_ready()
        if (
            len(self._live)
            >= self.config.max_num_waiting + self.plan.choices["scheduler"].options["max_num_seqs"]
        ):
            raise Overloaded(f"{len(self._live)} requests are in flight; try again later")

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache, with effect from the next request. Requests in flight are not
        affected.

        Raises `EngineUnavailable` if there is no engine.
        """
        if self.state not in ("ready", "draining"):
            self.check_ready()
        self._send(wire.ResetPrefixCache())

    async def drain(self, patience: float) -> bool:
        """Accept no more requests, and wait up to `patience` seconds for those in flight. Returns
        True if all have ended."""
        if self.state != "closed":
            self.state = "draining"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), patience)
        return not self._live

    async def close(self) -> None:
        """Stop the process. Requests in flight, and a pending `start`, get `EngineUnavailable`.
        Calling it again has no effect."""
        loaded = self._started is not None and self._started.done()
        self._closing = True
        self.state = "closed"
        closed = EngineUnavailable("the engine was closed")
        self._fail_all(closed)
        if self._started is not None and not self._started.done():
            self._started.set_exception(closed)
            # Mark the exception as retrieved: it is not an error if nothing waits for `start`.
            self._started.exception()
        if self._process is not None and loaded:
            self._send(wire.Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), CLOSE_PATIENCE)
        self._kill()
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor

    # Requests.

    def _admit(self, request: Request) -> LiveRequest:
        self.check_admission()
        if request.request_id in self._request_ids:
            raise InvalidRequest(
                f"request id {request.request_id!r} is already in use", param="request_id"
            )
        if request.params.n > self.config.max_num_waiting:
            raise InvalidRequest(
                f"n is {request.params.n}, but only {self.config.max_num_waiting} sequences may"
                " wait (max_num_waiting)",
                param="n",
            )
        self._num_admitted += 1
        live = LiveRequest(
            RequestState(request, self.tokenizer),
            f"{request.request_id}-{self._num_admitted}",
            self._send,
        )
        live.limit(self.config.queue_timeout, self.config.request_timeout)
        self._send(wire.Add(msgspec.structs.replace(request, request_id=live.engine_id)))
        self._live[live.engine_id] = live
        self._request_ids.add(request.request_id)
        self._idle.clear()
        return live

    def _send(self, message: msgspec.Struct) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    def _fail_all(self, error: DovetailError) -> None:
        for live in self._live.values():
            live.fail(error)

    # The process.

    async def _supervise(self) -> None:
        """Run engine processes one after another until closed. The first one must start."""
        assert self._started is not None
        while not self._closing:
            self._restarts.begin()
            try:
                await self._run_process()
                error: DovetailError = EngineDead("the engine process ended")
            except DovetailError as e:
                error = e
            except Exception as e:  # a bug here must not leave clients waiting
                log.exception("the supervisor caught an unexpected error")
                error = EngineDead(f"the engine process could not be run: {type(e).__name__}: {e}")
            if self._closing:
                return
            if not self._started.done():
                self.state = "closed"
                self._started.set_exception(error)
                return
            if self.state != "draining":
                self.state = "restarting"
            self.stats = EngineStats()  # the counters of the old process are lost
            self._fail_all(EngineDead(f"the engine died: {error.message}"))
            if self.state == "draining":
                return
            backoff = self._restarts.failed(self._num_finished)
            if backoff is None:
                self.state, self.failure = (
                    "failed",
                    f"{error.message}; no request finished in {MAX_RESTARTS} restarts",
                )
                log.error("the engine has failed and is not restarted: %s", self.failure)
                self.failed.set()
                return
            log.error("the engine died (%s); starting a new one in %.1f s", error.message, backoff)
            await asyncio.sleep(backoff)

    async def _run_process(self) -> None:
        """Start a process and handle its messages until it ends. Raises the error that it reported,
        or `EngineDead`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=wire.MAX_FRAME)
        # `Start` must be the first message: a reader that leaves may send its abort only after it.
        writer.write(wire.encode(wire.Start(self.plan.encode())))
        self._writer = writer
        try:
            with theirs:
                # -P: do not import from the working directory, which may be a model's folder.
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",
                    "-m",
                    "dovetail.runtime.engine_process",
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                )
            watch = asyncio.create_task(self._watch())
            reading = asyncio.create_task(self._read_until_end(reader))
            # The socket may stay open longer than the process, in a child of it.
            ending = asyncio.create_task(self._process.wait())
            try:
                await asyncio.wait({watch, reading, ending}, return_when=asyncio.FIRST_COMPLETED)
                if ending.done():
                    await asyncio.wait({reading}, timeout=LAST_WORDS)
                if reading.done():
                    reading.result()
                elif watch.done():
                    watch.result()
            except _Stalled:
                await self._dump_stacks()
                raise
            finally:
                for task in (watch, reading, ending):
                    task.cancel()
                await asyncio.gather(watch, reading, ending, return_exceptions=True)
            code = await self._process.wait()
            raise EngineDead(f"the process ended with {_describe_exit(code)}")
        finally:
            self._writer.close()
            self._kill()
            if self._process is not None:
                await self._process.wait()

    async def _read_until_end(self, reader: asyncio.StreamReader) -> None:
        self._num_heard = 0
        while (frame := await wire.read_frame_async(reader)) is not None:
            self._num_heard += 1
            self._dispatch(wire.from_engine.decode(frame))

    async def _dump_stacks(self) -> None:
        """Make a stalled process write the stacks of its threads. A stopped process cannot do
        that."""
        if self._process is not None and self._process.returncode is None:
            log.error("the engine has stalled: the stacks of its threads follow")
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(DUMP_SECONDS)

    async def _watch(self) -> None:
        """Raise an error if the process is silent for `heartbeat_timeout`. A process that is busy
        with a step still sends heartbeats.

        Silence is counted in short sleeps of this process, so that its own pauses (a debugger,
        Ctrl-Z, high load) do not count as silence of the engine.
        """
        limit = self.config.heartbeat_timeout
        nap, silent, heard = limit / 20, 0.0, 0
        while silent < (
            limit if self.state in ("ready", "draining") else max(limit, START_PATIENCE)
        ):
            await asyncio.sleep(nap)
            silent = silent + nap if heard == self._num_heard else 0.0
            heard = self._num_heard
        raise _Stalled(f"the process sent no message for {silent:.1f} s (heartbeat_timeout)")

    def _dispatch(self, message: Any) -> None:
        match message:
            case wire.StepOutputs():
                self.stats, self._slow = message.stats, SLOW
                for output in message.outputs:
                    live = self._live.get(output.request_id)
                    if live is not None:
                        live.push(output)
            case wire.Shadow():
                self.shadow = message.report
            case wire.Heartbeat():
                where = f", in {message.where}" if message.where else ""
                is_serving = self.state in ("ready", "draining")
                limit = max(self.config.stall_timeout, STALL_FACTOR * message.expected)
                if is_serving and message.busy > limit:
                    raise _Stalled(
                        f"a step has been running for {message.busy:.0f} s (stall_timeout){where}"
                    )
                if not is_serving and message.busy > self.config.load_timeout:
                    raise _Stalled(
                        f"loading made no progress for {message.busy:.0f} s (load_timeout){where}"
                    )
                if is_serving and message.busy > self._slow:
                    log.warning("a step has been running for %.1f s%s", message.busy, where)
                    self._slow *= 2
            case wire.Invoked():
                self.invoked.update(message.invoked)
            case wire.Refused():
                live = self._live.get(message.request_id)
                if live is not None:
                    live.fail(ERRORS.get(message.code, DovetailError)(message.message))
            case wire.Loading():
                if self._progress is not None:
                    self._progress(message.what, message.done, message.total)
            case wire.Ready():
                if message.fingerprint != self.plan.fingerprint:
                    raise PluginError(
                        "the engine was built from another plan than the front-end's; restart the"
                        " server"
                    )
                self.stats, self.weights = message.stats, message.weights
                self._restarts.ready()
                if self.state in ("loading", "restarting"):
                    self.state = "ready"
                if self._started is not None and not self._started.done():
                    self._started.set_result(None)
            case wire.Failed():
                raise ERRORS.get(message.code, DovetailError)(message.message)

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"
