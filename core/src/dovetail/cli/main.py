"""Run the `dovetail` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dovetail import __version__
from dovetail.cli.arguments import add_engine_arguments, check_lock, config_values
from dovetail.errors import DovetailError


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status. An expected error is printed as one line, without a
    traceback."""
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
    parser = argparse.ArgumentParser(
        "dovetail", description="An LLM inference engine built from plugins."
    )
    parser.add_argument("--version", action="version", version=f"dovetail {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    plugins = command(
        "plugins", _plugins, "list installed plugins, what each offers, and what is broken"
    )
    plugins.add_argument("--json", action="store_true", help="print JSON")

    explain = command(
        "explain", _explain, "show the plan of an engine with reasons; loads no weights"
    )
    explain.add_argument(
        "config_file", nargs="?", metavar="CONFIG", help="an engine config (YAML or TOML)"
    )
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.add_argument("--model", help="a plugin's model name, a local path or a hub id")
    add_engine_arguments(explain, with_config=False)

    lock = command(
        "lock", _lock, "record everything that determines what an engine computes, for --locked"
    )
    lock.add_argument(
        "config_file", nargs="?", metavar="CONFIG", help="an engine config (YAML or TOML)"
    )
    lock.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="default: CONFIG with the suffix .lock, or dovetail.lock",
    )
    lock.add_argument("--model", help="a plugin's model name, a local path or a hub id")
    add_engine_arguments(lock, with_config=False)

    serve = command("serve", _serve, "serve a model over the OpenAI API")
    serve.add_argument("model", nargs="?", help="a plugin's model name, a local path or a hub id")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    for flag, type_, help in SERVER_FLAGS:
        serve.add_argument(
            flag, dest=f"engine:server.{flag[2:].replace('-', '_')}", type=type_, help=help
        )
    add_engine_arguments(serve)

    generate = command("generate", _generate, "complete prompts and stream the text")
    generate.add_argument("prompt", nargs="+")
    _sampling_flags(generate)
    generate.add_argument("--model")
    add_engine_arguments(generate)

    chat = command("chat", _chat, "chat with a model in the terminal")
    chat.add_argument("model", nargs="?")
    chat.add_argument("--system", help="system message")
    _sampling_flags(chat, max_tokens=None)
    add_engine_arguments(chat)

    if not argv or argv[0] not in commands.choices:
        from dovetail.cli.added import add_installed

        add_installed(command, list(commands.choices))
    return parser


SERVER_FLAGS: tuple[tuple[str, type, str], ...] = (
    (
        "--api-key",
        str,
        (
            "API key that clients must send as a bearer token; other processes can read it on the"
            " command line, but not in DOVETAIL_API_KEY"
        ),
    ),
    ("--api-key-file", str, "file of API keys, one per line"),
    ("--max-body-mb", float, "maximum size of a request body in MiB"),
    ("--drain-seconds", float, "seconds that SIGTERM waits for requests in flight"),
)
"""Server options that operators set on the command line."""


def _sampling_flags(parser: argparse.ArgumentParser, max_tokens: int | None = 128) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens)
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--seed", type=int)


def _plugins(args: argparse.Namespace) -> int:
    from dovetail.cli.show import show_plugins

    return show_plugins(as_json=args.json)


def _explain(args: argparse.Namespace) -> int:
    from dovetail.cli.show import show_plan

    return show_plan(args.config_file, config_values(args), as_json=args.json)


def _lock(args: argparse.Namespace) -> int:
    from dovetail.cli.lock import lock

    return lock(args.config_file, config_values(args), args.out)


def _serve(args: argparse.Namespace) -> int:
    from dovetail.cli.run import serve

    check_lock(args)
    return serve(args.config_file, config_values(args), args.host, args.port)


def _sampling(args: argparse.Namespace) -> Any:
    from dovetail.types import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )


def _generate(args: argparse.Namespace) -> int:
    from dovetail.cli.run import generate

    check_lock(args)
    return generate(args.config_file, config_values(args), args.prompt, _sampling(args))


def _chat(args: argparse.Namespace) -> int:
    from dovetail.cli.run import chat

    check_lock(args)
    return chat(args.config_file, config_values(args), args.system, _sampling(args))


if __name__ == "__main__":
    sys.exit(main())
