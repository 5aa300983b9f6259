"""The `dovetail` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dovetail import __version__
from dovetail.errors import DovetailError


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status. An error that we foresaw is one line, not a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser(argv).parse_args(argv)
        status: int = args.run(args)
        return status
    except DovetailError as e:
        print(f"dovetail: {e.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141


def _parser(argv: list[str] | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dovetail", description="An LLM inference engine in which everything is a plugin.")
    parser.add_argument("--version", action="version", version=f"dovetail {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    plugins = command("plugins", _plugins, "list installed plugins, what each offers, and what is broken")
    plugins.add_argument("--json", action="store_true", help="for machines")

    explain = command("explain", _explain, "show what an engine would be made of, and why; loads no weights")
    explain.add_argument("config_file", nargs="?", metavar="CONFIG", help="a composition file (YAML or TOML)")
    explain.add_argument("--json", action="store_true", help="for machines")
    explain.add_argument("--model", help="a plugin's model name, a local folder, or a hub id")
    _engine_flags(explain, with_config=False)

    conform = command("conform", _conform, "test providers by the contracts of their sockets, on this machine")
    conform.add_argument("name", metavar="NAME", help="a provider (name or dist:name), or a distribution, for all it offers")
    conform.add_argument("--json", action="store_true", help="for machines")
    conform.add_argument("--device", default="cpu", help="cpu (default), cuda:0")
    conform.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the provider")
    conform.add_argument("--seeds", type=int, default=1, metavar="N", help="runs, each with other random inputs (default 1)")
    conform.add_argument("-k", dest="keyword", metavar="EXPR", help="only checks whose names match, as in pytest")

    new = command("new-plugin", _new_plugin, "write a package for a socket, which installs and keeps its contract as it stands")
    new.add_argument("socket", metavar="SOCKET", help="attention, scheduler, quantization, …; see docs/hooks.md")
    new.add_argument("name", metavar="NAME", help="of the package and of what it offers: my_backend")
    new.add_argument("--out", metavar="DIR", help="the folder to make (default: NAME)")

    lock = command("lock", _lock, "write down all that decides what an engine computes, for --locked")
    lock.add_argument("config_file", nargs="?", metavar="CONFIG", help="a composition file (YAML or TOML)")
    lock.add_argument("-o", "--out", metavar="FILE", help="default: CONFIG with the suffix .lock, or dovetail.lock")
    lock.add_argument("--model", help="a plugin's model name, a local folder, or a hub id")
    _engine_flags(lock, with_config=False)

    serve = command("serve", _serve, "serve a model over the OpenAI API")
    serve.add_argument("model", nargs="?", help="a plugin's model name, a local folder, or a hub id")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    for flag, type_, help in SERVER_FLAGS:
        serve.add_argument(flag, dest=f"engine:server.{flag[2:].replace('-', '_')}", type=type_, help=help)
    _engine_flags(serve)

    generate = command("generate", _generate, "complete prompts and print the text as it comes")
    generate.add_argument("prompt", nargs="+")
    _sampling_flags(generate)
    generate.add_argument("--model")
    _engine_flags(generate)

    chat = command("chat", _chat, "talk to a model in the terminal")
    chat.add_argument("model", nargs="?")
    chat.add_argument("--system", help="a system message")
    _sampling_flags(chat, max_tokens=None)
    _engine_flags(chat)

    bench = command("bench", _bench, "measure throughput, latency, or a running server")
    kinds = bench.add_subparsers(required=True, metavar="KIND", dest="kind")
    for kind, help in (
        ("throughput", "output tokens per second of many requests at once"),
        ("latency", "time to first token and decode speed of one request"),
        ("serve", "requests per second, TTFT and inter-token latency over HTTP"),
    ):
        sub = kinds.add_parser(kind, help=help)
        sub.add_argument("model", nargs="?")
        sub.add_argument("--input-len", type=int, default=128, help="prompt tokens (default 128)")
        sub.add_argument("--output-len", type=int, default=64, help="tokens to generate (default 64)")
        sub.add_argument("--rounds", type=int, default=5, help="repeats; the median is reported (default 5)")
        sub.add_argument("--json", metavar="FILE", help="also write the results to a file")
        if kind == "latency":
            sub.set_defaults(plot=None)
        else:
            waves, together = ("as many as run at a time", "all, or 64") if kind == "throughput" else ("4 × those", "16")
            sub.add_argument("--num-requests", type=int, help=f"requests of a round (default: {waves})")
            at_a_time = f"requests at a time; several are a sweep (default: {together})"
            sub.add_argument("--concurrency", type=_counts, metavar="N,N,…", help=at_a_time)
            sub.add_argument("--plot", metavar="FOLDER", help="also write plots: PNG, and one self-contained page of HTML")
        if kind == "throughput":
            sub.add_argument("--breakdown", action="store_true", help="also time the parts of a step (without overlap)")
        if kind == "serve":
            sub.add_argument("--url", default="http://127.0.0.1:8000")
        _engine_flags(sub)
    if not argv or argv[0] not in commands.choices:
        from dovetail.cli.added import add_installed

        add_installed(command, list(commands.choices))
    return parser


def _counts(text: str) -> list[int]:
    """`1,2,4` as numbers, each at least 1."""
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different counts, such as 1,2,4,8")
    return counts


_FLAGS: tuple[tuple[str, str, type, str], ...] = (
    ("--device", "device", str, "auto, cpu, cuda:0"),
    ("--dtype", "dtype", str, "auto, float32, bfloat16, float16"),
    ("--max-model-len", "max_model_len", int, "longest sequence, in tokens"),
    ("--revision", "revision", str, "branch, tag or commit of a model on the hub"),
    ("--served-model-name", "served_model_name", str, "the name clients use"),
    ("--quantization", "quantization", str, "auto, none, or a scheme for the whole model"),
    ("--architecture", "architecture.use", str, "architecture provider"),
    ("--worker", "worker.use", str, "worker provider"),
    ("--attention", "attention.default.use", str, "attention provider"),
    ("--prefix-cache", "prefix_cache.use", str, "prefix-cache provider; none: without"),
    ("--speculation", "speculation.use", str, "drafter provider; none: without"),
    ("--num-draft-tokens", "speculation.num_draft_tokens", int, "most tokens drafted for a sequence in a step"),
    ("--scheduler", "scheduler.use", str, "scheduler provider"),
    ("--max-num-seqs", "scheduler.max_num_seqs", int, "sequences that run at a time"),
    ("--max-num-batched-tokens", "scheduler.max_num_batched_tokens", int, "tokens in a step"),
    ("--block-size", "kv_cache.block_size", int, "tokens in a KV block"),
    ("--kv-cache-dtype", "kv_cache.dtype", str, "auto, float32, bfloat16, float16, fp8, int8"),
    ("--gpu-memory-utilization", "kv_cache.memory_fraction", float, "share of the memory that the engine may take"),
    ("--kv-cache-memory-gb", "kv_cache.memory_gb", float, "GiB for the KV cache"),
    ("--max-num-waiting", "max_num_waiting", int, "sequences that may wait"),
    ("--queue-timeout", "queue_timeout", float, "seconds that a request may wait for its first step"),
    ("--request-timeout", "request_timeout", float, "seconds that a request may take in all"),
    ("--stall-timeout", "stall_timeout", float, "seconds after which a step counts as stalled"),
)


SERVER_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("--api-key", str, "clients must send it as a bearer token; other processes can see it here, but not in DOVETAIL_API_KEY"),
    ("--api-key-file", str, "a file of such keys, one a line"),
    ("--max-body-mb", float, "largest request body, MiB"),
    ("--drain-seconds", float, "how long SIGTERM waits for requests in flight"),
)
"""Options of the server that operators set."""


class _PrefixCaching(argparse.BooleanOptionalAction):
    """vLLM's flag, for the socket: any prefix cache, or none."""

    def __init__(self, option_strings: list[str], dest: str, nargs: int = 0, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        wanted = option_string is not None and not option_string.startswith("--no-")
        setattr(namespace, self.dest, "auto" if wanted else "none")


def _engine_flags(parser: argparse.ArgumentParser, *, with_config: bool = True) -> None:
    group = parser.add_argument_group("engine")
    if with_config:
        group.add_argument("--config", dest="config_file", metavar="FILE", help="a composition file (YAML or TOML)")
        group.add_argument("--locked", metavar="LOCK", help="refuse to run what differs from this lock; see `dovetail lock`")
    for flag, key, kind, help in _FLAGS:
        group.add_argument(flag, dest=f"engine:{key}", type=kind, help=help)
    group.add_argument(
        "--overlap", dest="engine:overlap", action=argparse.BooleanOptionalAction, help="schedule a step while one runs"
    )
    group.add_argument(
        "--enable-prefix-caching", dest="engine:prefix_cache.use", action=_PrefixCaching, nargs=0,
        help="--no-enable-prefix-caching: without (--prefix-cache none)",
    )  # fmt: skip
    group.add_argument("--trust-remote-code", dest="engine:trust_remote_code", action="store_true", default=None)
    group.add_argument("--tensor-parallel-size", type=int, default=1, help="only 1 so far")


def _sampling_flags(parser: argparse.ArgumentParser, max_tokens: int | None = 128) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens)
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--seed", type=int)


def _config_values(args: argparse.Namespace) -> dict[str, Any]:
    """The engine flags that were given, as nested config values."""
    from dovetail.errors import ConfigError

    if getattr(args, "tensor_parallel_size", 1) != 1:
        raise ConfigError("--tensor-parallel-size: no installed worker runs on more than one device yet; use 1")
    values: dict[str, Any] = {}
    for name, value in vars(args).items():
        if name.startswith("engine:") and value is not None:
            *path, last = name.removeprefix("engine:").split(".")
            place = values
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
    if getattr(args, "model", None) is not None:
        values["model"] = args.model
    return values


def _plugins(args: argparse.Namespace) -> int:
    from dovetail.cli.show import show_plugins

    return show_plugins(as_json=args.json)


def _explain(args: argparse.Namespace) -> int:
    from dovetail.cli.show import show_plan

    return show_plan(args.config_file, _config_values(args), as_json=args.json)


def _conform(args: argparse.Namespace) -> int:
    from dovetail.cli.conform import conform

    return conform(
        args.name, as_json=args.json, device=args.device, options=args.option, num_seeds=args.seeds, keyword=args.keyword
    )


def _new_plugin(args: argparse.Namespace) -> int:
    from dovetail.cli.new_plugin import write

    return write(args.socket, args.name, args.out)


def _lock(args: argparse.Namespace) -> int:
    from dovetail.cli.lock import lock

    return lock(args.config_file, _config_values(args), args.out)


def _check_lock(args: argparse.Namespace) -> None:
    if args.locked is not None:
        from dovetail.cli.lock import check
        from dovetail.config import load_config

        check(load_config(args.config_file, **_config_values(args)), args.locked)


def _serve(args: argparse.Namespace) -> int:
    from dovetail.cli.run import serve

    _check_lock(args)
    return serve(args.config_file, _config_values(args), args.host, args.port)


def _sampling(args: argparse.Namespace) -> Any:
    from dovetail.types import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed
    )


def _generate(args: argparse.Namespace) -> int:
    from dovetail.cli.run import generate

    _check_lock(args)
    return generate(args.config_file, _config_values(args), args.prompt, _sampling(args))


def _chat(args: argparse.Namespace) -> int:
    from dovetail.cli.run import chat

    _check_lock(args)
    return chat(args.config_file, _config_values(args), args.system, _sampling(args))


def _bench(args: argparse.Namespace) -> int:
    from dovetail.cli.run import bench

    _check_lock(args)
    return bench(args.kind, args, args.config_file, _config_values(args))


if __name__ == "__main__":
    sys.exit(main())
