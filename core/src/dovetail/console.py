"""Where commands print."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """A terminal's own width; for a pipe or a file, wide enough that nothing is folded."""
    console = Console()
    return console if console.is_terminal else Console(width=1000)
