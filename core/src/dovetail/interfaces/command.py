"""Commands: what a package adds to `dovetail COMMAND`.

A command is no part of an engine, so it fills no extension point and is in no plan. It joins in by
an entry point in the group `dovetail.commands`: its name is the command's, its value the place of a
`Command`.

    [project.entry-points."dovetail.commands"]
    quantize = "my_package:QUANTIZE"

The module is imported when the command is given and when `dovetail --help` lists all of them, so it
is light: what is heavy is imported in `run`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

from dovetail.interfaces.worker import Progress

GROUP = "dovetail.commands"


@dataclass(frozen=True)
class Command:
    """A subcommand. Errors that it foresees are `DovetailError`s: they are printed as one line, and
    the exit status is 2."""

    summary: str
    """One line, for the list of commands."""
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, Progress], int]
    """With the parsed arguments, and whom to tell how far it is; returns the exit status. Results
    go to stdout."""
