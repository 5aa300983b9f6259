"""Mistakes that servers make, over ours. Each runs in a process of its own, in which it may change
what it likes."""

from __future__ import annotations

import signal
import socket
import sys
from functools import partial

from dovetail.errors import ConfigError
from dovetail_server_openai import dovetail_servers, server
from dovetail_server_openai.server import OpenAIServer
from sabotage import Sabotages

SABOTAGES = Sabotages("server", dovetail_servers()[0])
STOPS, LOADS, TAKEN, START, DRAINS = (
    "test_it_serves_until_told_to_stop",
    "test_it_can_be_stopped_while_it_loads",
    "test_a_taken_address_is_an_error",
    "test_an_engine_that_does_not_start_is_an_error",
    "test_requests_in_flight_are_finished",
)
SHORT = {"patience": 8}
"""For those that do nothing where something is waited for."""


def make(cls, context, options):
    return cls(options)


def sabotage(*caught_by, **attributes):
    return lambda cls: SABOTAGES.add(cls, caught_by, attributes, build=partial(make, cls))


@sabotage(STOPS, LOADS, **SHORT)
class IgnoresSigterm(OpenAIServer):
    """SIGTERM and SIGINT are ignored."""

    def run(self, engine, host, port, on_ready):
        server._Draining.handle_exit = lambda self, sig, frame: None
        super().run(engine, host, port, on_ready)


@sabotage(STOPS)
class DiesOfSignals(OpenAIServer):
    """A signal ends the process on the spot."""

    def run(self, engine, host, port, on_ready):
        server._Draining.handle_exit = lambda self, sig, frame: signal.raise_signal(signal.SIGKILL)
        super().run(engine, host, port, on_ready)


@sabotage(DRAINS)
class ReturnsBeforeDrained(OpenAIServer):
    """On SIGTERM it stops at once, with requests in flight."""

    def run(self, engine, host, port, on_ready):
        def stop(self, sig, frame):
            self.should_exit = self.force_exit = True

        server._Draining.handle_exit = stop
        super().run(engine, host, port, on_ready)


@sabotage(LOADS, STOPS)
class ReadyTooEarly(OpenAIServer):
    """`on_ready` is called before the engine is started."""

    def run(self, engine, host, port, on_ready):
        on_ready(f"http://{host}:{port}")
        super().run(engine, host, port, lambda url: None)


@sabotage(STOPS, **SHORT)
class NeverReady(OpenAIServer):
    """`on_ready` is not called."""

    def run(self, engine, host, port, on_ready):
        super().run(engine, host, port, lambda url: None)


@sabotage(STOPS)
class ReadyTwice(OpenAIServer):
    """`on_ready` is called twice."""

    def run(self, engine, host, port, on_ready):
        super().run(engine, host, port, lambda url: (on_ready(url), on_ready(url)))


@sabotage(STOPS)
class UrlWithoutPort(OpenAIServer):
    """The URL has no port."""

    def run(self, engine, host, port, on_ready):
        super().run(engine, host, port, lambda url: on_ready(url.rpartition(":")[0]))


@sabotage(STOPS)
class KeepsListening(OpenAIServer):
    """When it has returned, its address still takes connections."""

    def run(self, engine, host, port, on_ready):
        bind, kept = server._bind, []

        def bound(host, port):
            kept.append(bind(host, port))
            return (
                socket.socket(fileno=kept[0].dup().detach()) if hasattr(kept[0], "dup") else kept[0]
            )

        server._bind = bound
        super().run(engine, host, port, on_ready)
        self.kept = kept


@sabotage(START)
class SwallowsTheError(OpenAIServer):
    """What kept the engine from starting is not told."""

    def run(self, engine, host, port, on_ready):
        try:
            super().run(engine, host, port, on_ready)
        except ConfigError:
            raise
        except Exception:
            return


@sabotage(TAKEN)
class ExitsOnATakenAddress(OpenAIServer):
    """An address that is taken ends the program, without an error that can be caught as one."""

    def run(self, engine, host, port, on_ready):
        try:
            super().run(engine, host, port, on_ready)
        except ConfigError:
            sys.exit(1)


@sabotage(TAKEN)
class TakesAnotherAddress(OpenAIServer):
    """Where an address is taken, it takes another one without a word."""

    def run(self, engine, host, port, on_ready):
        try:
            super().run(engine, host, port, on_ready)
        except ConfigError:
            super().run(engine, host, 0, on_ready)


@sabotage(TAKEN, **SHORT)
class WaitsForTheAddress(OpenAIServer):
    """It waits until an address that is taken is free."""

    def run(self, engine, host, port, on_ready):
        while True:
            try:
                return super().run(engine, host, port, on_ready)
            except ConfigError:
                signal.sigtimedwait([], 0.1)
