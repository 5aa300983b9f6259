"""Build the console that commands print to."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """Return a console with the terminal's width; for a pipe or a file, one so wide that no line is
    wrapped."""
    console = Console()
    return console if console.is_terminal else Console(width=1000)
