"""Add the commands of installed packages. See `dovetail.interfaces.command`."""

from __future__ import annotations

import importlib.metadata
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from typing import Any

from dovetail.errors import PluginError
from dovetail.interfaces.command import GROUP, Command

AddCommand = Callable[[str, Any, str], ArgumentParser]
"""Function to add a command: (name, function to run, summary) -> parser."""


def add_installed(add: AddCommand, known: Iterable[str]) -> None:
    """Add all commands of installed packages. Raises `PluginError` if two have the same name. A
    command that cannot be imported is listed, and fails when it is run."""
    owners = dict.fromkeys(known, "dovetail-core")
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        owner = entry.dist.name if entry.dist is not None else entry.value
        if entry.name in owners:
            owner_names = f"one from {owners[entry.name]}, one from {owner}"
            raise PluginError(
                f"two commands are named {entry.name!r}: {owner_names}; uninstall one"
            )
        owners[entry.name] = owner
        try:
            command = _loaded(entry)
        except Exception as e:
            why = f"the command {entry.name!r} of {owner} is broken: {type(e).__name__}: {e}"
            add(entry.name, _failing(why, owner), why.replace("%", "%%"))
            continue
        command.add_arguments(add(entry.name, _with_progress(command), command.summary))


def _loaded(entry: EntryPoint) -> Command:
    command = entry.load()
    if not isinstance(command, Command):
        raise TypeError(f"{entry.value} is {type(command).__name__}, not a Command")
    return command


def _with_progress(command: Command) -> Callable[[Namespace], int]:
    def run(args: Namespace) -> int:
        from dovetail.cli.run import progress_bars

        with progress_bars() as progress:
            return command.run(args, progress)

    return run


def _failing(why: str, owner: str) -> Callable[[Namespace], int]:
    def run(args: Namespace) -> int:
        raise PluginError(why, provider=owner)

    return run
