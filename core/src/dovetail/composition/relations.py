"""What providers say about each other's presence, and who has to give way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dovetail.errors import PluginError
from dovetail.plan import Reason
from dovetail.plugin.discovery import Offer
from dovetail.plugin.provider import Relation


class Unsatisfied(PluginError):
    """Nobody can fill a socket, because of what `auto` took elsewhere: `culprits` are the qualified names of those."""

    def __init__(self, message: str, culprits: list[str], provider: str | None = None) -> None:
        super().__init__(message, provider=provider)
        self.culprits = culprits


@dataclass(frozen=True)
class Neighbours:
    """What is known of the other sockets while one is filled: choices made, and those asked for by name."""

    taken: dict[str, Offer] = field(default_factory=dict)
    """By key of the plan."""
    by_auto: set[str] = field(default_factory=set)
    """Of those: qualified names that `auto` took."""
    excluded: dict[str, Reason] = field(default_factory=dict)
    """By qualified name: offers that `auto` has to leave, because they leave no choice elsewhere."""


NOBODY = Neighbours()


def relations(offer: Offer, where: str, neighbours: Neighbours) -> list[Reason]:
    """What this offer has against its neighbours, and they against it."""
    reasons = []
    for key, other in neighbours.taken.items():
        if key != where:
            reasons += [_reason(code, relation, other, key) for code, relation in _violated(offer, other)]
            for code, relation in _violated(other, offer):
                said = _reason(code, relation, offer, where)
                reasons.append(replace(said, text=f"{key} is {other.provider.name}, which {said.text}", hint=f"change {key}"))
    return reasons


def _violated(one: Offer, other: Offer) -> Iterator[tuple[str, Relation]]:
    names = (other.socket, other.provider.name, other.qualified_name)
    yield from (("conflicts", r) for r in one.provider.conflicts if r.meets(*names))
    yield from (("requires", r) for r in one.provider.requires if r.socket == other.socket and not r.meets(*names))


def _reason(code: str, relation: Relation, other: Offer, key: str) -> Reason:
    if code == "conflicts":
        return Reason(f"does not go with {other.provider.name} ({key}): {relation.because}", f"change {key}", code)
    wanted = " or ".join(relation.providers)
    text = f"needs {relation.socket}: {wanted}, and {key} is {other.provider.name}: {relation.because}"
    return Reason(text, f"change {key}", code)


def culprits_of(offers: list[Offer], where: str, neighbours: Neighbours) -> list[str]:
    """Those that `auto` took and without which one of `offers` would have fewer reasons against it."""
    return [
        other.qualified_name
        for key, other in neighbours.taken.items()
        if other.qualified_name in neighbours.by_auto
        and any(relations(o, where, Neighbours({key: other})) for o in offers)
    ]


def untested(offer: Offer, where: str, neighbours: Neighbours) -> list[str]:
    return [
        f"untested with {its.provider.name} ({of}): {relation.because}"
        for key, other in neighbours.taken.items()
        for one, its, of in ((offer, other, key), (other, offer, where))
        for relation in one.provider.untested_with
        if key != where and relation.meets(its.socket, its.provider.name, its.qualified_name)
    ]
