"""Choosing a provider for an extension point: the one that was asked for, or the best one that has
no reason against it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from pydantic import ValidationError

from dovetail.composition.relations import (
    NONE,
    OtherChoices,
    Unsatisfied,
    conflicting_with,
    relations,
    untested,
)
from dovetail.errors import ConfigError, DovetailError, PluginError
from dovetail.plan import Choice, Reason, Rejected
from dovetail.plugin.config import ProviderConfig
from dovetail.plugin.discovery import Offer, Registry
from dovetail.plugin.extension_points import ExtensionPoint
from dovetail.plugin.provider import Context, Options


def choose(
    registry: Registry,
    point_name: str,
    wanted: ProviderConfig,
    context: Context,
    where: str | None = None,
    other_choices: OtherChoices = NONE,
) -> Choice:
    """Fill an extension point. `where` is the path in the configuration, for errors.

    Asked by name: that provider, or an error with its reasons and the alternatives; another one
    only if the configuration says `on_unsupported: fallback`. `auto`: the usable provider of
    highest priority. Every candidate not taken is in `Choice.rejected`, with why.
    """
    where = where or point_name
    extension_point = registry.extension_points[point_name]
    offers = sorted(registry.of(point_name), key=lambda o: (-o.provider.priority, o.qualified_name))
    against = {
        o.qualified_name: _reasons(extension_point, o, context) + relations(o, where, other_choices)
        for o in offers
    }
    if wanted.use == "auto":
        for name, reason in other_choices.excluded.items():
            if name in against:
                against[name].append(reason)
    usable = [o for o in offers if not against[o.qualified_name]]

    if extension_point.optional and (wanted.use == "none" or (wanted.use == "auto" and not usable)):
        if wanted.options:
            raise ConfigError(
                f"{where}: options are given ({', '.join(wanted.options)}), but no provider is"
                " selected"
            )
        said = [Reason("none was asked for", f"set {where}: auto", "not-asked")]
        rejected = [
            Rejected(o.provider.name, o.plugin.distribution, against[o.qualified_name] or said)
            for o in offers
        ]
        return Choice(
            extension_point=point_name,
            requested=wanted.use,
            provider="none",
            distribution="",
            version="",
            contract="",
            options={},
            rejected=rejected,
        )
    if wanted.use != "auto":
        named = _find(registry, offers, point_name, wanted.use, where)
        if against[named.qualified_name] and wanted.on_unsupported == "error":
            reasons = "; ".join(map(str, against[named.qualified_name]))
            others = ", ".join(o.provider.name for o in usable) or "none"
            raise Unsatisfied(
                f"{where}: {wanted.use!r} cannot be used here: {reasons}. Usable: {others}. "
                "Name one of those, or set on_unsupported: fallback",
                conflicting_with([named], where, other_choices),
                named.qualified_name,
            )
        usable = [named] if not against[named.qualified_name] else usable
    if not usable:
        listing = (
            "".join(f"\n  {name}: {'; '.join(map(str, why))}" for name, why in against.items())
            or " none is installed"
        )
        conflicting = conflicting_with(offers, where, other_choices)
        raise Unsatisfied(
            f"{where}: no provider can be used:{listing}{_broken(registry)}", conflicting
        )
    taken = usable[0]
    rejected = [
        Rejected(
            o.provider.name,
            o.plugin.distribution,
            against[o.qualified_name] or [_second_best(o, taken, wanted, where)],
        )
        for o in offers
        if o is not taken
    ]
    options, remarks = _resolved_options(taken, context, wanted, where)
    version = extension_point.served(taken.plugin.written_for(extension_point.name))
    assert isinstance(version, str)  # or there would be a reason against it
    deprecated = extension_point.deprecation(version)
    remarks = [
        *([deprecated] if deprecated else []),
        *untested(taken, where, other_choices),
        *remarks,
    ]
    return Choice(
        extension_point=point_name,
        requested=wanted.use,
        provider=taken.provider.name,
        distribution=taken.plugin.distribution,
        version=taken.plugin.version,
        contract=version,
        options=options.model_dump(mode="json"),
        remarks=remarks,
        rejected=rejected,
    )


def choose_all(
    registry: Registry,
    point_name: str,
    wanted: list[ProviderConfig],
    context: Context,
    other_choices: OtherChoices = NONE,
) -> list[Choice]:
    """Fill an extension point that takes many: those named, or every usable one if `wanted` is
    empty."""
    usable = [
        o
        for o in registry.of(point_name)
        if not _reasons(registry.extension_points[point_name], o, context)
    ]
    named = wanted or [ProviderConfig(use=o.qualified_name) for o in usable]
    choices = [choose(registry, point_name, w, context, None, other_choices) for w in named]
    _refuse_twice([c.provider for c in choices], point_name)
    return [c if wanted else msgspec.structs.replace(c, requested="auto") for c in choices]


def _refuse_twice(names: list[str], where: str) -> None:
    if twice := {n for n in names if names.count(n) > 1}:
        raise ConfigError(f"{where}: {', '.join(sorted(twice))} is named more than once")


def find(registry: Registry, choice: Choice) -> Offer:
    """The offer that a plan's choice names, in this process."""
    for offer in registry.of(choice.extension_point):
        if (offer.provider.name, offer.plugin.distribution) == (
            choice.provider,
            choice.distribution,
        ):
            return offer
    why = registry.broken.get(choice.distribution, "it is not installed here")
    raise PluginError(
        f"{choice.extension_point}: the plan takes {choice.provider!r} of {choice.distribution}:"
        f" {why}"
    )


def _reasons(extension_point: ExtensionPoint, offer: Offer, context: Context) -> list[Reason]:
    provider = offer.provider
    version = extension_point.served(offer.plugin.written_for(extension_point.name))
    if isinstance(version, Reason):
        return [version]
    try:
        unsupported = [
            replace(r, code="unsupported") for r in extension_point.unsupported(provider, context)
        ]
        return [*unsupported, *provider.why_not(context)]
    except Exception as e:
        return [Reason(f"its why_not raised {type(e).__name__}: {e}", code="faulty")]


def _find(
    registry: Registry, offers: list[Offer], extension_point: str, name: str, where: str
) -> Offer:
    matches = [o for o in offers if name in (o.provider.name, o.qualified_name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise PluginError(
            f"{where}: several plugins offer {name!r}; say which:"
            f" {', '.join(o.qualified_name for o in matches)}"
        )
    names = [o.provider.name for o in offers]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise PluginError(
        f"{where}: no provider {name!r}.{hint} Installed:"
        f" {', '.join(names) or 'none'}.{_broken(registry)}"
    )


def _broken(registry: Registry) -> str:
    if not registry.broken:
        return ""
    return "\nBroken plugins: " + "; ".join(
        f"{dist}: {why}" for dist, why in registry.broken.items()
    )


def _second_best(offer: Offer, taken: Offer, wanted: ProviderConfig, where: str) -> Reason:
    hint = f"set {where}: {offer.provider.name}"
    if wanted.use in (taken.provider.name, taken.qualified_name):
        return Reason(f"{wanted.use} was asked for", hint, "not-asked")
    return Reason(
        f"priority {offer.provider.priority}; {taken.provider.name} has {taken.provider.priority}",
        hint,
        "priority",
    )


def _resolved_options(
    offer: Offer, context: Context, wanted: ProviderConfig, where: str
) -> tuple[Options, list[str]]:
    options = _options(offer, wanted.options, where)
    try:
        return offer.provider.resolve_options(context, options)
    except DovetailError:
        raise
    except Exception as e:
        name = offer.qualified_name
        raise PluginError(
            f"{where}: {name}: its settle raised {type(e).__name__}: {e}", provider=name
        ) from e


def _options(offer: Offer, given: Mapping[str, Any], where: str) -> Options:
    model = offer.provider.options
    try:
        return model.model_validate(dict(given))
    except ValidationError as e:
        known = ", ".join(model.model_fields) or "none"
        problems = "; ".join(
            f"{where}.{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in e.errors()
        )
        raise ConfigError(f"{problems}. Options of {offer.provider.name}: {known}") from None
