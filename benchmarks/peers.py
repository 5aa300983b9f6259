"""Dovetail beside the other engines that run here: same models, prompts, bits, threads, greedy;
rounds taken in turn.

    python benchmarks/peers.py --peers-dir DIR [--peers llama.cpp,vllm] [--models c,a] [--cases
        A,B,D,E] [--json FILE]
    python benchmarks/peers.py --peers-dir DIR --bits 8 --models a --cases A,B

DIR/venvs/{lcpp,vllm,ov} are the peers' own environments (benchmarks/README.md says how they are
made); transformers is the one of this environment. A peer that is not there is said to be so.
Cases: A one request; B a batch; D process start to first token; E HTTP. Between its rounds an
engine is stopped (SIGSTOP), so that none spins while another is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import signal
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from models import SHAPES, folder_of
from peers.engines import OURS, Driver, Engine, PeerFailed, Server
from peers.quantized import BY_BITS
from peers.ratios import Round, markdown, rows
from rich.console import Console

from dovetail.errors import ConfigError, DovetailError
from dovetail_bench.load import Work
from dovetail_bench.machine import in_words, machine
from dovetail_bench.over_http import serve_round

BATCH = {"a": 32, "c": 64}
CASES = {
    "A": "one request, 128 + 128",
    "B": "{count} requests at once, 128 + 64",
    "D": "new process, 16 + 1",
    "E": "200 HTTP requests, 16 at a time, 64 + 32",
}
HTTP = Work(input_len=64, output_len=32, num_requests=200, concurrency=16)
HTTP_FIGURES = ("requests/s", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms")
ONLY_TINY = ("D", "E")

T = TypeVar("T")
P = TypeVar("P", Driver, Server)
log = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class Bench:
    """All rounds of one run."""

    def __init__(
        self, engines: list[Engine], peers: Path, threads: int, num_rounds: int, lock: Path | None
    ) -> None:
        self.engines = engines
        self.versions: dict[str, str] = {}
        self.first_tokens: dict[str, dict[str, int]] = {}
        self.rounds: list[Round] = []
        self.failed: dict[str, str] = {}
        """By model, case and engine: why it has no figures."""
        self._peers, self._threads, self._num_rounds, self._lock = peers, threads, num_rounds, lock

    def run(self, key: str, case: str) -> None:
        if (case in ONLY_TINY and key != "c") or (case == "B" and key not in BATCH):
            return
        {"A": self._in_process, "B": self._in_process, "D": self._starts, "E": self._over_http}[
            case
        ](key, case)

    @contextlib.contextmanager
    def _machine_to_itself(self) -> Iterator[None]:
        """Hold the lock file that others on this machine also heed, if there is one."""
        if self._lock is None:
            yield
            return
        with self._lock.open("a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def _start(
        self, kind: type[P], engines: list[Engine], key: str, case: str, stack: contextlib.ExitStack
    ) -> list[P]:
        """Start each; one that does not come up is noted, and the others go on without it."""
        started = []
        for engine in engines:
            log.print(f"{key} {case}: loading {engine.title}")
            try:
                with self._machine_to_itself():
                    process = kind(engine, folder_of(key), self._peers, self._threads)
            except PeerFailed as e:
                self._note_failure(engine, key, case, e)
                continue
            started.append(process)
            stack.callback(process.close)
        return started

    def _note_failure(self, engine: Engine, key: str, case: str, error: DovetailError) -> None:
        log.print(f"{engine.title}: {error.message}")
        self.failed[f"{key} {case} {engine.name}"] = error.message

    def _in_process(self, key: str, case: str) -> None:
        count = BATCH[key] if case == "B" else 1
        size = {
            "case": case,
            "num_requests": count,
            "input_len": 128,
            "output_len": 64 if case == "B" else 128,
        }
        with contextlib.ExitStack() as stack:
            drivers = self._start(Driver, self.engines, key, case, stack)
            for driver in drivers:
                self.versions[driver.engine.name] = driver.version
                self.first_tokens.setdefault(key, {})[driver.engine.name] = driver.first_token
                with self._machine_to_itself():
                    driver.ask({**size, "seed": 0, "output_len": 8})  # warm up
            for number in range(1, self._num_rounds + 1):
                with self._machine_to_itself():
                    for driver in in_turn(drivers, number):
                        self._add(
                            driver.engine, key, case, number, driver.ask({**size, "seed": number})
                        )

    def _starts(self, key: str, case: str) -> None:
        for number in range(self._num_rounds + 1):
            with self._machine_to_itself():
                for engine in in_turn(self.engines, number):
                    began = time.perf_counter()
                    driver = Driver(engine, folder_of(key), self._peers, self._threads)
                    seconds = time.perf_counter() - began
                    driver.close()
                    self.versions[engine.name] = driver.version
                    if number:  # the first start only fills the file cache
                        self._add(engine, key, case, number, {"start to first token, s": seconds})

    def _over_http(self, key: str, case: str) -> None:
        engines = [e for e in self.engines if e.server_missing(self._peers) is None]
        with contextlib.ExitStack() as stack:
            servers = self._start(Server, engines, key, case, stack)
            for server in list(servers):
                try:
                    with self._machine_to_itself(), server.running():
                        serve_round(server.url, "m", HTTP, 0)  # warm up
                except ConfigError as e:
                    servers.remove(server)
                    self._note_failure(server.engine, key, case, e)
            for number in range(1, self._num_rounds + 1):
                with self._machine_to_itself():
                    for server in in_turn(servers, number):
                        with server.running():
                            figures = serve_round(server.url, "m", HTTP, number)
                        self._add(
                            server.engine,
                            key,
                            case,
                            number,
                            {name: figures[name] for name in HTTP_FIGURES},
                        )

    def _add(
        self, engine: Engine, key: str, case: str, number: int, figures: dict[str, float]
    ) -> None:
        words = CASES[case].format(count=BATCH.get(key))
        self.rounds.append(Round(engine.name, SHAPES[key][1], f"{case}: {words}", number, figures))
        told = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
        log.print(f"{key} {case} round {number}: {engine.title:14s} {told}")


def in_turn(engines: list[T], number: int) -> list[T]:
    """Each round begins with another one, so that no engine is always the one after the slowest."""
    shift = number % len(engines)
    return engines[shift:] + engines[:shift]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers-dir", type=Path, required=True, metavar="DIR", help="the folder with venvs/"
    )
    named = {bits: [name for name in engines if name != OURS] for bits, engines in BY_BITS.items()}
    listed = "; ".join(f"{bits} bits: {', '.join(names)}" for bits, names in named.items())
    parser.add_argument("--bits", type=int, choices=BY_BITS, default=16, help="of the weights")
    parser.add_argument(
        "--peers",
        type=_some_of({n for names in named.values() for n in names}),
        metavar="P,P",
        help=listed,
    )
    parser.add_argument(
        "--models", type=_some_of(SHAPES), default=["c", "a", "b"], metavar="M,M", help="of a, b, c"
    )
    parser.add_argument(
        "--cases", type=_some_of(CASES), default=list(CASES), metavar="C,C", help="of A, B, D, E"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--lock",
        type=Path,
        metavar="FILE",
        help="a lock file (flock) to hold while a round runs, not between",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    peers, known = args.peers_dir.resolve(), BY_BITS[args.bits]
    asked = args.peers or named[args.bits]
    if unknown := [name for name in asked if name not in known]:
        parser.error(f"--peers: {', '.join(unknown)} has no form of {args.bits} bits; {listed}")
    missing = {name: reason for name in asked if (reason := known[name].missing(peers)) is not None}
    for name, reason in missing.items():
        log.print(f"{known[name].title}: {reason}")
    engines = [known[name] for name in (OURS, *asked) if name not in missing]
    bench = Bench(engines, peers, args.threads, args.rounds, args.lock)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # not without ending the engines, which may be standing still
    try:
        for key in args.models:
            for case in args.cases:
                bench.run(key, case)
    except DovetailError as e:
        log.print(f"peers: {e.message}")
        return 1
    finally:
        if bench.rounds:
            _tell(bench, args, missing)
    return 0


def _tell(bench: Bench, args: argparse.Namespace, missing: dict[str, str]) -> None:
    table, here, date = rows(bench.rounds, OURS), machine(), time.strftime("%Y-%m-%d")
    how = f"{args.threads} threads, {args.bits} bit, {date}, {args.rounds} rounds"
    print(f"{in_words(here)} ({', '.join(here['flags'])}), {how}")
    known = BY_BITS[args.bits]
    print(
        ", ".join(f"{known[name].title} {version}" for name, version in bench.versions.items())
        + "\n"
    )
    print(markdown(table, {e.name: e.title for e in bench.engines}, OURS))
    for name, reason in missing.items():
        print(f"\n{known[name].title}: {reason}")
    for what, reason in bench.failed.items():
        print(f"\n{what} failed: {reason}")
    if args.json:
        about: dict[str, Any] = {
            "date": date,
            "machine": here,
            "threads": args.threads,
            "bits": args.bits,
            "rounds": args.rounds,
            "versions": bench.versions,
            "missing": missing,
            "failed": bench.failed,
            "first_token": bench.first_tokens,
        }
        data = {
            "about": about,
            "rows": [asdict(row) for row in table],
            "rounds": [asdict(r) for r in bench.rounds],
        }
        args.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _some_of(known: Collection[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [n for n in names if n not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: not among {', '.join(sorted(known))}"
            )
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
