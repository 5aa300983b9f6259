"""Select a provider for an extension point: the requested one, or with `auto` the usable one with
the highest priority."""

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
    """Select a provider for an extension point. `where` is the path in the engine config, for
    errors.

    For a provider requested by name, return it, or raise an error with the reasons and the
    alternatives; another one is selected only with `on_unsupported: fallback`. For `auto`, return
    the usable provider with the highest priority. `Choice.rejected` has every other candidate with
    the reasons.
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
                f"{where}: options were given ({', '.join(wanted.options)}), but no provider is"
                " selected"
            )
        not_requested = [Reason("none was requested", f"set {where}: auto", "not-asked")]
        rejected = [
            Rejected(
                o.provider.name,
                o.plugin.distribution,
                against[o.qualified_name] or not_requested,
            )
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
                "Request one of those, or set on_unsupported: fallback",
                conflicting_with([named], where, other_choices),
                named.qualified_name,
            )
        usable = [named] if not against[named.qualified_name] else usable
    if not usable:
        listing = (
            "".join(f"\n  {name}: {'; '.join(map(str, why))}" for name, why in against.items())
            or " no provider is installed"
        )
        conflicting = conflicting_with(offers, where, other_choices)
        raise Unsatisfied(
            f"{where}: no provider can be used:{listing}{_broken(registry)}", conflicting
        )
    selected = usable[0]
    rejected = [
        Rejected(
            o.provider.name,
            o.plugin.distribution,
            against[o.qualified_name] or [_not_selected(o, selected, wanted, where)],
        )
        for o in offers
        if o is not selected
    ]
    options, remarks = _resolved_options(selected, context, wanted, where)
    version = extension_point.served(selected.plugin.written_for(extension_point.name))
    assert isinstance(version, str)  # otherwise there is a reason against it
    deprecated = extension_point.deprecation(version)
    remarks = [
        *([deprecated] if deprecated else []),
        *untested(selected, where, other_choices),
        *remarks,
    ]
    return Choice(
        extension_point=point_name,
        requested=wanted.use,
        provider=selected.provider.name,
        distribution=selected.plugin.distribution,
        version=selected.plugin.version,
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
    """Select the providers of an extension point that has several: those named, or every usable one
    if `wanted` is empty."""
    usable = [
        o
        for o in registry.of(point_name)
        if not _reasons(registry.extension_points[point_name], o, context)
    ]
    named = wanted or [ProviderConfig(use=o.qualified_name) for o in usable]
    choices = [choose(registry, point_name, w, context, None, other_choices) for w in named]
    _check_duplicates([c.provider for c in choices], point_name)
    return [c if wanted else msgspec.structs.replace(c, requested="auto") for c in choices]


def _check_duplicates(names: list[str], where: str) -> None:
    if duplicates := {n for n in names if names.count(n) > 1}:
        raise ConfigError(f"{where}: {', '.join(sorted(duplicates))} is named more than once")


def find(registry: Registry, choice: Choice) -> Offer:
    """Return the offer for a plan's choice in this process."""
    for offer in registry.of(choice.extension_point):
        if (offer.provider.name, offer.plugin.distribution) == (
            choice.provider,
            choice.distribution,
        ):
            return offer
    why = registry.broken.get(choice.distribution, "it is not installed here")
    raise PluginError(
        f"{choice.extension_point}: the plan uses {choice.provider!r} of {choice.distribution}:"
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
            f"{where}: several plugins offer {name!r}; use a qualified name:"
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


def _not_selected(offer: Offer, selected: Offer, wanted: ProviderConfig, where: str) -> Reason:
    hint = f"set {where}: {offer.provider.name}"
    if wanted.use in (selected.provider.name, selected.qualified_name):
        return Reason(f"{wanted.use} was requested", hint, "not-asked")
    name, priority = selected.provider.name, selected.provider.priority
    return Reason(
        f"priority {offer.provider.priority}; {name} has {priority}",
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
            f"{where}: {name}: its function `resolve_options` raised {type(e).__name__}: {e}",
            provider=name,
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
