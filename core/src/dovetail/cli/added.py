"""Commands that installed packages add: see `dovetail.interfaces.command`."""

from __future__ import annotations

import importlib.metadata
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from typing import Any

from dovetail.errors import PluginError
from dovetail.interfaces.command import GROUP, Command

AddCommand = Callable[[str, Any, str], ArgumentParser]
"""Name, what runs it, its summary."""


def add_installed(add: AddCommand, known: Iterable[str]) -> None:
    """Add all of them. Raises `PluginError` for two of one name; one that cannot be imported is
    listed, and fails when run."""
    owners = dict.fromkeys(known, "dovetail-core")
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        owner = entry.dist.name if entry.dist is not None else entry.value
        if entry.name in owners:
            twins = f"one from {owners[entry.name]}, one from {owner}"
            raise PluginError(f"two commands are named {entry.name!r}: {twins}; uninstall one")
        owners[entry.name] = owner
        try:
            command = _loaded(entry)
        except Exception as e:
            why = f"the command {entry.name!r} of {owner} is broken: {type(e).__name__}: {e}"
            add(entry.name, _refuse(why, owner), why.replace("%", "%%"))
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


def _refuse(why: str, owner: str) -> Callable[[Namespace], int]:
    def run(args: Namespace) -> int:
        raise PluginError(why, provider=owner)

    return run
