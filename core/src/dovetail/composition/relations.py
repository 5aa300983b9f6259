"""Check the relations that providers declare, and find out which selection to exclude."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dovetail.errors import PluginError
from dovetail.plan import Reason
from dovetail.plugin.discovery import Offer
from dovetail.plugin.provider import Relation


class Unsatisfied(PluginError):
    """Raised if no provider can be used for an extension point because of what `auto` selected
    elsewhere: `conflicting` has the qualified names of those providers."""

    def __init__(self, message: str, conflicting: list[str], provider: str | None = None) -> None:
        super().__init__(message, provider=provider)
        self.conflicting = conflicting


@dataclass(frozen=True)
class OtherChoices:
    """The providers of the other extension points while one is selected."""

    selected: dict[str, Offer] = field(default_factory=dict)
    """Selected providers by plan key."""
    by_auto: set[str] = field(default_factory=set)
    """Qualified names of those that `auto` selected."""
    excluded: dict[str, Reason] = field(default_factory=dict)
    """Providers that `auto` must not select, by qualified name, because they conflict with another
    selection."""


NONE = OtherChoices()


def relations(offer: Offer, where: str, other_choices: OtherChoices) -> list[Reason]:
    """Return the conflicts of this offer with the other selections, in both directions."""
    reasons = []
    for key, other in other_choices.selected.items():
        if key != where:
            reasons += [
                _reason(code, relation, other, key) for code, relation in _violated(offer, other)
            ]
            for code, relation in _violated(other, offer):
                reason = _reason(code, relation, offer, where)
                reasons.append(
                    replace(
                        reason,
                        text=f"{key} is {other.provider.name}, which {reason.text}",
                        hint=f"change {key}",
                    )
                )
    return reasons


def _violated(one: Offer, other: Offer) -> Iterator[tuple[str, Relation]]:
    names = (other.extension_point, other.provider.name, other.qualified_name)
    yield from (("conflicts", r) for r in one.provider.conflicts if r.meets(*names))
    yield from (
        ("requires", r)
        for r in one.provider.requires
        if r.extension_point == other.extension_point and not r.meets(*names)
    )


def _reason(code: str, relation: Relation, other: Offer, key: str) -> Reason:
    if code == "conflicts":
        return Reason(
            f"conflicts with {other.provider.name} ({key}): {relation.because}",
            f"change {key}",
            code,
        )
    wanted = " or ".join(relation.providers)
    text = (
        f"requires {relation.extension_point}: {wanted}, but {key} is {other.provider.name}:"
        f" {relation.because}"
    )
    return Reason(text, f"change {key}", code)


def conflicting_with(offers: list[Offer], where: str, other_choices: OtherChoices) -> list[str]:
    """Return the providers that `auto` selected and without which at least one of `offers` would
    have fewer reasons against it."""
    return [
        other.qualified_name
        for key, other in other_choices.selected.items()
        if other.qualified_name in other_choices.by_auto
        and any(relations(o, where, OtherChoices({key: other})) for o in offers)
    ]


def untested(offer: Offer, where: str, other_choices: OtherChoices) -> list[str]:
    """Return a note for each untested combination with the other selections."""
    return [
        f"untested with {its.provider.name} ({of}): {relation.because}"
        for key, other in other_choices.selected.items()
        for one, its, of in ((offer, other, key), (other, offer, where))
        for relation in one.provider.untested_with
        if key != where
        and relation.meets(its.extension_point, its.provider.name, its.qualified_name)
    ]
