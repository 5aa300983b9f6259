"""`dovetail conform` and `dovetail new-plugin`. This module is light: what runs is imported when a
command is given."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from dovetail.interfaces.command import Command
from dovetail.interfaces.worker import Progress


def _add_conform_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        help="a provider (name or dist:name), or a distribution, for all it offers",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda:0")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the provider",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="runs, each with other random inputs (default 1)",
    )
    parser.add_argument(
        "-k", dest="keyword", metavar="EXPR", help="run only checks whose names match, as in pytest"
    )


def _conform(args: Namespace, progress: Progress) -> int:
    from dovetail_testing.commands.conform import conform

    return conform(
        args.name,
        as_json=args.json,
        device=args.device,
        options=args.option,
        num_seeds=args.seeds,
        keyword=args.keyword,
    )


def _add_new_plugin_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "extension_point",
        metavar="SOCKET",
        help="attention, scheduler, quantization, …; see docs/hooks.md",
    )
    parser.add_argument(
        "name", metavar="NAME", help="of the package and of what it offers: my_backend"
    )
    parser.add_argument("--out", metavar="DIR", help="the folder to make (default: NAME)")


def _new_plugin(args: Namespace, progress: Progress) -> int:
    from dovetail_testing.commands.new_plugin import write

    return write(args.extension_point, args.name, args.out)


CONFORM = Command(
    "test providers by the contracts of their extension points, on this machine",
    _add_conform_arguments,
    _conform,
)
NEW_PLUGIN = Command(
    "write a package for an extension point, which installs and keeps its contract as it stands",
    _add_new_plugin_arguments,
    _new_plugin,
)
