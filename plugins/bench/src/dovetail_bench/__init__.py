"""Add the command `dovetail bench`, which measures engines and servers. Code that measures is
imported only when the command runs."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from functools import partial

from dovetail.cli.arguments import add_engine_arguments, loaded_llm
from dovetail.interfaces.command import Command
from dovetail.interfaces.worker import Progress


def _add_arguments(parser: ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="KIND", dest="kind")
    for kind, help in (
        ("throughput", "output tokens per second of concurrent requests"),
        ("latency", "time to first token and decode speed of one request"),
        ("serve", "requests per second, TTFT and inter-token latency over HTTP"),
    ):
        sub = kinds.add_parser(kind, help=help)
        sub.add_argument("model", nargs="?")
        sub.add_argument("--input-len", type=int, default=128, help="prompt tokens (default 128)")
        sub.add_argument(
            "--output-len", type=int, default=64, help="tokens to generate (default 64)"
        )
        sub.add_argument(
            "--rounds",
            type=int,
            default=5,
            help="number of rounds; the median is reported (default 5)",
        )
        sub.add_argument("--json", metavar="FILE", help="also write the results to a file")
        if kind == "latency":
            sub.set_defaults(plot=None)
        else:
            num_requests, concurrency = (
                ("the concurrency", "--num-requests, or 64")
                if kind == "throughput"
                else ("4 × the concurrency", "16")
            )
            sub.add_argument(
                "--num-requests", type=int, help=f"requests per round (default: {num_requests})"
            )
            sub.add_argument(
                "--concurrency",
                type=_counts,
                metavar="N,N,…",
                help=f"concurrent requests; several values are a sweep (default: {concurrency})",
            )
            sub.add_argument(
                "--plot",
                metavar="FOLDER",
                help="also write plots: PNG and one self-contained HTML page",
            )
        if kind == "throughput":
            sub.add_argument(
                "--breakdown",
                action="store_true",
                help="also time the phases of a step (without overlap)",
            )
        if kind == "serve":
            sub.add_argument("--url", default="http://127.0.0.1:8000")
        add_engine_arguments(sub)


def _counts(text: str) -> list[int]:
    """Parse a list such as `1,2,4` into different numbers, each at least 1."""
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise ArgumentTypeError(f"{text!r} is not a list of different counts, such as 1,2,4,8")
    return counts


def _run(args: Namespace, progress: Progress) -> int:
    from dovetail_bench.measure import run

    return run(args.kind, args, partial(loaded_llm, args, progress))


BENCH = Command("measure throughput, latency, or a running server", _add_arguments, _run)
