"""Define commands: what a package adds to `dovetail COMMAND`.

A command is not part of an engine, so it belongs to no extension point and appears in no plan. It
is registered by an entry point in the group `dovetail.commands`: the name is that of the command,
the value the location of a `Command`.

    [project.entry-points."dovetail.commands"]
    quantize = "my_package:QUANTIZE"

The module is imported when the command runs and when `dovetail --help` lists all commands, so it
must be light: import what is heavy inside `run`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

from dovetail.interfaces.worker import Progress

GROUP = "dovetail.commands"


@dataclass(frozen=True)
class Command:
    """A subcommand. It reports expected errors as `DovetailError`s, which are printed as one line
    and give exit status 2."""

    summary: str
    """One line for the list of commands."""
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, Progress], int]
    """Runs the command with the parsed arguments and a progress callback, and returns the exit
    status. Results go to stdout."""
