"""Plugins that are wrong on purpose, one mistake each: the conformance kit must catch every one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dovetail.plugins.discovery import load_registry
from dovetail.provider import Provider
from dovetail.testing.contract import Contract
from dovetail.testing.contracts import contract_of


@dataclass(frozen=True)
class Sabotage:
    """A provider with one mistake."""

    name: str
    socket: str
    wrong: str
    """What is wrong with it."""
    provider: Provider[Any]
    caught_by: tuple[str, ...]
    """Checks that are there for this mistake: each must fail, whatever the seed."""
    options: dict[str, Any] = field(default_factory=dict)

    def contract(self, seed: int) -> type[Contract]:
        """The socket's contract with this provider, as a plugin's own test would subclass it."""
        base = contract_of(load_registry().sockets[self.socket])
        assert base is not None
        return type("Sabotaged", (base,), {"provider": self.provider, "options": self.options, "seed": seed})


def all_sabotages() -> list[Sabotage]:
    from sabotage import attention, kv_caches, schedulers, workers

    return [*attention.SABOTAGES, *schedulers.SABOTAGES, *kv_caches.SABOTAGES, *workers.SABOTAGES]
