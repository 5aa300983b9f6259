"""Run an engine in a process of its own: `python -m dovetail.runtime.engine_process FD`, where FD
is one end of a Unix socket pair.

There are three threads. The main thread runs the loop, one reads messages, and one sends
heartbeats, so that a long step can be told from a dead process, and messages that the loop could
not send at once. When the front-end exits, so does this process, even in the middle of a step.
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
"""Seconds between two reports of a shadow run while there is work; one more is sent when it
ends."""


class Link:
    """The engine's end of the socket: an inbox, and a `send` that never blocks the loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.inbox: queue.SimpleQueue[msgspec.Struct] = queue.SimpleQueue()
        self.busy_since: float | None = None
        """Time at which the current step or other work of the loop started; while loading, the time
        of the last progress. None when idle."""
        self.expected: Callable[[], float] = lambda: 0.0
        """Returns the predicted duration of the running step in seconds."""
        self.where: Callable[[], str] = lambda: ""
        """Returns the provider whose code is running."""
        self._changed = threading.Condition()
        self._backlog: deque[bytes] = deque()
        """Data that the socket did not accept at once, for the writer thread. The first entry stays
        until it has been sent."""
        self._closing = False
        self._writer = threading.Thread(target=self._write, daemon=True)
        threading.Thread(target=self._read, daemon=True).start()
        self._writer.start()

    def send(self, message: msgspec.Struct) -> None:
        """Send a message, usually with one system call. Waking a thread for it would cost the loop
        more, and delay the message."""
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
        """Send the remaining messages, then stop."""
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
        except OSError:  # connection reset: the front-end exited without reading everything
            status = 0
        # A message that cannot be decoded ends the process: without its inbox it would only appear
        # to be alive.
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)  # the front-end is gone, so nothing is waiting for this process

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
    """Predicts the duration of a step from the largest step so far. Smaller steps take longer per
    token."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._seconds = 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        if num_tokens >= self._num_tokens:
            self._num_tokens, self._seconds = num_tokens, seconds

    def predicted(self, num_tokens: int) -> float:
        """Return the predicted duration in seconds; 0 if no step has run yet."""
        return self._seconds * max(1.0, num_tokens / self._num_tokens) if self._num_tokens else 0.0


def main() -> None:
    """Build the engine from the plan received, run it until `Shutdown`, and report any error."""
    # Ctrl-C and a service manager's stop reach the whole process group, but the front-end has to
    # drain and decides when to stop. Handlers are used instead of SIG_IGN, which would be inherited
    # by programs that this process starts.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    # The front-end sends SIGUSR1 before it kills a stalled process: the stacks of all threads are
    # written to stderr.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)  # a child with an open copy would hide that this process ended
    link = Link(sock)
    try:
        # What is imported and built lives as long as the process. The garbage collector is kept
        # away from it, because with a tensor library in memory a collection takes tens of
        # milliseconds.
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
                f"{key}: the plan has {choice.distribution} {choice.version}, but"
                f" {offer.plugin.version} is installed"
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
        times.record(engine.num_scheduled_tokens, time.monotonic() - began)
        # Sent even without outputs: a prefill step, or one that freed the last blocks, changes the
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
            why = "the request waited too long for its first step (queue_timeout); try again later"
            engine.fail(message.request_id, Overloaded.code, why)
    elif isinstance(message, wire.ResetPrefixCache):
        engine.kv.reset_prefix_cache()
        link.send(wire.StepOutputs([], msgspec.structs.replace(engine.snapshot())))


if __name__ == "__main__":
    main()
