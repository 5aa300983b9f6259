from __future__ import annotations
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from dovetail.interfaces.worker import Progress
GROUP = 'dovetail.commands'

@dataclass(frozen=True)
class Command:
    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, Progress], int]
