"""The engine in a process of its own: `python -m dovetail.runtime.engine_process FD`, FD being one
end of a Unix socket pair.

Three threads: the main one runs the loop, one reads messages, one sends heartbeats, so that a long
step is told from a dead process, and what the loop could not send at once. When the front-end goes
away, so does this process, even in the middle of a step.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

import msgspec

from dovetail.assembly.attestation import Attestation
from dovetail.assembly.attribution import ENGINE, Attribution
from dovetail.assembly.compose import build_engine, shadow_report_of, weights_of
from dovetail.composition.selection import find
from dovetail.engine.engine import Engine
from dovetail.errors import DovetailError, Overloaded, PluginError
from dovetail.plan import Plan
from dovetail.plugin.discovery import load_registry
from dovetail.runtime import wire

HEARTBEAT = 0.25
"""Seconds between heartbeats."""
REPORT_EVERY = 1.0
"""Seconds between two reports of a shadow run, while there is work; one more comes when it ends."""


class Link:
    """The engine's end of the socket: an inbox, and a `send` that never blocks the loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.inbox: queue.SimpleQueue[msgspec.Struct] = queue.SimpleQueue()
        self.busy_since: float | None = None
        """When the step, or what else the loop is doing, began; while loading, when there was
        progress. None when idle."""
        self.expected: Callable[[], float] = lambda: 0.0
        """Seconds that the running step was predicted to take."""
        self.where: Callable[[], str] = lambda: ""
        """In whose code the loop is."""
        self._changed = threading.Condition()
        self._backlog: deque[bytes] = deque()
        """What the socket did not take at once, for the writer; the first one until it has been
        sent."""
        self._closing = False
        self._writer = threading.Thread(target=self._write, daemon=True)
        threading.Thread(target=self._read, daemon=True).start()
        self._writer.start()

    def send(self, message: msgspec.Struct) -> None:
        """Mostly one system call. Waking a thread for it would cost the loop more, and the news
        would be later."""
        data = wire.encode(message)
        with self._changed:
            if not self._backlog:
                try:
                    data = data[self._sock.send(data, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass
                except OSError:
                    os._exit(0)
            if data:
                self._backlog.append(data)
                self._changed.notify()

    def close(self) -> None:
        """Send what is left, then stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._writer.join(timeout=5)

    def _read(self) -> None:
        status = 1
        try:
            while (frame := wire.read_frame(self._sock)) is not None:
                self.inbox.put(wire.to_engine.decode(frame))
            status = 0
        except OSError:  # reset: it left without reading what was sent
            status = 0
        except (
            Exception
        ):  # what cannot be read ends the process: half deaf, it would only look alive
            traceback.print_exc()
        finally:
            os._exit(status)  # the front-end is gone: nobody waits for anything

    def _write(self) -> None:
        try:
            while True:
                with self._changed:
                    if (
                        not self._backlog
                        and not self._closing
                        and not self._changed.wait(HEARTBEAT)
                    ):
                        self._backlog.append(wire.encode(self._heartbeat()))
                    if not self._backlog:
                        if self._closing:
                            return
                        continue
                    data = self._backlog[0]
                self._sock.sendall(data)
                with self._changed:
                    self._backlog.popleft()
        except OSError:
            os._exit(0)

    def _heartbeat(self) -> wire.Heartbeat:
        since = self.busy_since
        busy = 0.0 if since is None else time.monotonic() - since
        return wire.Heartbeat(busy, self.where() if busy > 1 else "", self.expected())


class StepTimes:
    """Predicts how long a step takes from the one with most tokens so far: small steps cost more a
    token."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._seconds = 0.0

    def took(self, num_tokens: int, seconds: float) -> None:
        if num_tokens >= self._num_tokens:
            self._num_tokens, self._seconds = num_tokens, seconds

    def predicted(self, num_tokens: int) -> float:
        """Seconds; 0 if no step has run yet."""
        return self._seconds * max(1.0, num_tokens / self._num_tokens) if self._num_tokens else 0.0


def main() -> None:
    """Build from the plan that arrives, run until told to stop, and say why when that fails."""
    # Ctrl-C and a service manager's stop reach the whole group, and the front-end still has to
    # drain: it decides. Handlers, not SIG_IGN, because that would be inherited by the programs that
    # this one starts.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    # The front-end asks for this before it ends a process that has stalled: the stacks of all
    # threads, on stderr.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)  # a child that keeps it open would hide this process's end
    link = Link(sock)
    try:
        # What is imported and built lives as long as the process: collections need not look at it,
        # neither now nor later, when it would take tens of milliseconds with a tensor library in
        # memory.
        gc.disable()
        attestation = Attestation()
        engine, ready = _start(link, attestation)
        gc.freeze()
        gc.enable()
        link.send(ready)
        try:
            _loop(engine, link, attestation)
        except DovetailError:
            raise
        except Exception as e:
            traceback.print_exc()
            raise PluginError(f"{engine.responsible(e, ENGINE)}: {type(e).__name__}: {e}") from e
        engine.worker.close()
    except DovetailError as e:
        link.send(wire.Failed(e.code, e.message))
    except Exception as e:
        link.send(wire.Failed(DovetailError.code, f"{type(e).__name__}: {e}"))
        raise
    finally:
        link.close()


def _start(link: Link, attestation: Attestation) -> tuple[Engine, wire.Ready]:
    first = link.inbox.get()
    assert isinstance(first, wire.Start)
    plan = Plan.decode(first.plan)
    registry = load_registry()
    for key, choice in plan.choices.items():
        if choice.is_empty:
            continue
        offer = find(registry, choice)
        if offer.plugin.version != choice.version:
            raise PluginError(
                f"{key}: the plan has {choice.distribution} {choice.version}, here is"
                f" {offer.plugin.version}"
            )

    def progress(what: str, done: int, total: int) -> None:
        link.busy_since = time.monotonic()
        link.send(wire.Loading(what, done, total))

    link.busy_since = time.monotonic()
    engine = build_engine(plan, progress, registry, attestation)
    link.busy_since = None
    if isinstance(engine.responsible, Attribution):
        link.where = engine.responsible.running
    return engine, wire.Ready(
        plan.fingerprint, engine.snapshot(), weights_of(plan, registry, engine.worker)
    )


def _loop(engine: Engine, link: Link, attestation: Attestation) -> None:
    num_invoked = -1
    report = shadow_report_of(engine.worker)
    reported, times = time.monotonic(), StepTimes()
    link.expected = lambda: times.predicted(engine.num_scheduled_tokens)
    while True:
        if sum(attestation.invoked.values()) != num_invoked:
            num_invoked = sum(attestation.invoked.values())
            link.send(wire.Invoked(attestation.invoked))
        try:
            while True:
                if report is not None and (
                    not engine.has_work or time.monotonic() > reported + REPORT_EVERY
                ):
                    link.send(wire.Shadow(report))
                    reported = time.monotonic()
                message = link.inbox.get(block=not engine.has_work)
                if isinstance(message, wire.Shutdown):
                    if report is not None:
                        link.send(wire.Shadow(report))
                    return
                link.busy_since = time.monotonic()
                _handle(engine, link, message)
                link.busy_since = None
        except queue.Empty:
            pass
        link.busy_since = began = time.monotonic()
        outputs = engine.step()
        link.busy_since = None
        times.took(engine.num_scheduled_tokens, time.monotonic() - began)
        # Also without outputs: a step of prefill, or one that freed the last blocks, changes the
        # stats.
        link.send(wire.StepOutputs(outputs, msgspec.structs.replace(engine.snapshot())))


def _handle(engine: Engine, link: Link, message: msgspec.Struct) -> None:
    if isinstance(message, wire.Add):
        try:
            engine.add(message.request)
        except DovetailError as e:
            link.send(wire.Refused(message.request.request_id, e.code, e.message))
    elif isinstance(message, wire.Abort):
        engine.abort(message.request_id, message.sample_index)
    elif isinstance(message, wire.Expire):
        group = engine.requests.get(message.request_id, ())
        if not any(seq.started_at for seq in group):
            why = (
                "the request has waited too long for its first step (queue_timeout); try again"
                " later"
            )
            engine.fail(message.request_id, Overloaded.code, why)
    elif isinstance(message, wire.ResetPrefixCache):
        engine.kv.reset_prefix_cache()
        link.send(wire.StepOutputs([], msgspec.structs.replace(engine.snapshot())))


if __name__ == "__main__":
    main()
