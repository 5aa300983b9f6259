"""Implement `dovetail conform`: test a provider against the contract of its extension point on this
machine, without a test file."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dovetail.console import wide_console
from dovetail.errors import ConfigError
from dovetail.interfaces.quantization import PLAIN, QuantizationCapabilities
from dovetail.plugin.discovery import Offer, Registry, load_registry
from dovetail.plugin.provider import Provider

if TYPE_CHECKING:
    from rich.console import Console

from dovetail_testing.contract import KIT_MODEL, RUN_SEED, Contract
from dovetail_testing.contracts import contract_of
from dovetail_testing.running import CheckResult, run_contracts

STYLES = {
    "passed": "green",
    "failed": "bold red",
    "not declared": "dim",
    "expected failure": "yellow",
}


def conform(
    name: str,
    *,
    as_json: bool,
    device: str,
    options: list[str],
    num_seeds: int,
    keyword: str | None,
) -> int:
    """Run the checks and report. The exit status is 1 if a check failed, or a provider cannot be
    used on this machine."""
    registry = load_registry()
    offers = _offers(name, registry)
    if options and len(offers) > 1:
        named = ", ".join(o.qualified_name for o in offers)
        raise ConfigError(
            f"--option needs a single provider, but {name!r} names {named}: use one of these"
        )
    console = wide_console()
    passed, reports = True, []
    for offer in _with_contract(registry, offers):
        reasons = _why_not(registry, offer, device)
        classes = (
            {} if reasons else _classes(registry, offer, device, _parsed(offer, options), num_seeds)
        )
        if as_json:
            results = run_contracts(classes, keyword=keyword or "") if classes else []
        else:
            console.print(_head(offer, device))
            with console.status("checking …") as status:
                results = (
                    run_contracts(
                        classes,
                        keyword=keyword or "",
                        on_result=lambda r: status.update(f"{r.contract}: {r.check}"),
                    )
                    if classes
                    else []
                )
            _print(console, results, reasons)
        passed = passed and not reasons and not any(r.outcome == "failed" for r in results)
        reports.append(_as_data(offer, device, results, reasons))
    if as_json:
        print(json.dumps(reports, indent=2))
    return 0 if passed else 1


def _offers(name: str, registry: Registry) -> list[Offer]:
    """Return the offers of a provider (by plain or qualified name), plugin or distribution. Raises
    `ConfigError`."""
    found = [
        o
        for o in registry.offers
        if name in (o.provider.name, o.qualified_name, o.plugin.name, o.plugin.distribution)
    ]
    if not found:
        broken = {
            p.name: registry.broken[p.distribution]
            for p in registry.plugins
            if p.distribution in registry.broken
        }
        names = ", ".join(sorted({o.provider.name for o in registry.offers}))
        dists = ", ".join(sorted({p.distribution for p in registry.plugins}))
        why = f" Broken plugins: {broken}." if broken else ""
        raise ConfigError(
            f"conform: {name!r} is neither a provider ({names}) nor a distribution ({dists}).{why}"
        )
    return found


def _with_contract(registry: Registry, offers: list[Offer]) -> list[Offer]:
    """Return the offers whose extension points have a contract class; the others are named on
    stderr. Raises `ConfigError` if there are none."""
    without = [
        o for o in offers if contract_of(registry.extension_points[o.extension_point]) is None
    ]
    unchecked = "; ".join(
        f"{o.qualified_name}: the extension point {o.extension_point} has no contract class"
        for o in without
    )
    if len(without) == len(offers):
        raise ConfigError(f"conform: nothing can be checked: {unchecked}")
    if unchecked:
        print(f"dovetail: not checked: {unchecked}", file=sys.stderr)
    return [o for o in offers if o not in without]


def _classes(
    registry: Registry, offer: Offer, device: str, options: dict[str, Any], num_seeds: int
) -> dict[str, type[Contract]]:
    """Return subclasses of the extension point's contract, as in a plugin's own test, by label; one
    per seed."""
    contract = contract_of(registry.extension_points[offer.extension_point])
    assert contract is not None
    settings = {
        "provider": offer.provider,
        "device": device,
        "options": options,
        "inner": contract.inner | _inner(registry, offer),
        "version": (
            registry.extension_points[offer.extension_point].served(
                offer.plugin.written_for(offer.extension_point)
            )
        ),
    }
    seeds = range(RUN_SEED, RUN_SEED + num_seeds)
    return {
        f"{offer.provider.name}, seed {s}": type(
            "Conformance", (contract,), {**settings, "seed": s}
        )
        for s in seeds
    }


def _inner(registry: Registry, offer: Offer) -> dict[str, Provider[Any]]:
    """Return the best provider for each extension point that the provider's plugin adds within this
    one."""
    inner = {}
    for extension_point in registry.extension_points.values():
        if (
            extension_point.within == offer.extension_point
            and not extension_point.many
            and registry.added_by[extension_point.name] == offer.plugin
        ):
            best = max(
                registry.of(extension_point.name), key=lambda o: o.provider.priority, default=None
            )
            if best is not None:
                inner[extension_point.name] = best.provider
    return inner


def _parsed(offer: Offer, options: list[str]) -> dict[str, Any]:
    import yaml

    values = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or key not in offer.provider.options.model_fields:
            known = ", ".join(offer.provider.options.model_fields) or "none"
            raise ConfigError(
                f"--option {option}: expected KEY=VALUE; the options of {offer.qualified_name} are:"
                f" {known}"
            )
        values[key] = yaml.safe_load(text)
    return values


def _why_not(registry: Registry, offer: Offer, device: str) -> list[str]:
    """Return why the provider cannot be used on this machine, for a model without special
    requirements."""
    from dovetail.facts import device_facts
    from dovetail.plugin.provider import Context

    if device not in device_facts().devices:
        return [
            f"device {device} does not exist; this machine has {', '.join(device_facts().devices)}"
        ]
    declared = getattr(offer.provider.capabilities, "devices", None)
    if declared is not None and device.partition(":")[0] not in declared:
        return [
            f"it supports {', '.join(declared)}, but the device is {device}: select another with"
            " --device"
        ]
    try:
        context = Context(
            device_facts(),
            KIT_MODEL,
            device,
            "float32",
            _needs(registry) if offer.extension_point == "worker" else {},
        )
        return [str(r) for r in offer.provider.why_not(context)]
    except Exception as e:
        return [f"its why_not raised {type(e).__name__}: {e}"]


def _needs(registry: Registry) -> dict[str, Any]:
    """Return the requirements on a worker from providers that a plan would have selected before it:
    the best installed model code, and unquantized weights."""
    best = max(registry.of("architecture"), key=lambda o: o.provider.priority, default=None)
    weights = [o.provider.capabilities for o in registry.of("quantization")]
    return {
        "architecture": best.provider.capabilities if best else None,
        "quantization": [
            can
            for can in weights
            if isinstance(can, QuantizationCapabilities) and PLAIN in can.methods
        ],
        "compiled_attention": False,
    }


def _head(offer: Offer, device: str) -> Text:
    owner = f"{offer.plugin.distribution} {offer.plugin.version}"
    what = f": written for contract {_written_for(offer)} of {offer.extension_point}, on {device}"
    return Text.assemble((offer.provider.name, "bold"), f" from {owner}", what)


def _written_for(offer: Offer) -> str:
    return str(offer.plugin.written_for(offer.extension_point) or "not stated")


def _print(console: Console, results: list[CheckResult], reasons: list[str]) -> None:
    for reason in reasons:
        console.print(Text(f"cannot be used here: {reason}", STYLES["failed"]))
    table = Table("check", "outcome", "why", box=None, pad_edge=False, header_style="bold")
    checks: dict[str, list[CheckResult]] = {}
    for r in results:
        checks.setdefault(r.check, []).append(r)
    for check, runs in checks.items():
        counts = {o: sum(r.outcome == o for r in runs) for o in STYLES}
        shown = [(o, n) for o, n in counts.items() if n]
        outcome = Text(", ").join(
            Text(o if n == len(runs) == 1 else f"{n} {o}", STYLES[o]) for o, n in shown
        )
        why = next(
            (r.reason for r in runs if r.outcome == "failed"),
            runs[0].reason if len(shown) == 1 else "",
        )
        table.add_row(_words(check), outcome, Text(why.splitlines()[0] if why else ""))
    console.print(table)
    for check, runs in checks.items():
        for r in [r for r in runs if r.outcome == "failed"][:1]:
            console.print()
            console.print(Text(_words(check), STYLES["failed"]))
            rows = (
                ("found", r.reason),
                ("the contract requires", r.asks),
                ("smallest failing input", r.input),
                ("common causes", r.causes),
                ("to reproduce", f"DOVETAIL_TEST_SEED={r.seed}" if r.seed else ""),
            )
            detail = Table.grid(padding=(0, 2))
            for what, text in rows:
                if text:
                    detail.add_row(Text(what, "dim"), Text(text))
            console.print(detail)
    num = {o: sum(r.outcome == o for r in results) for o in sorted(STYLES)}
    total = ", ".join(f"{n} {o}" for o, n in num.items() if n) or "nothing was checked"
    console.print(
        Text(
            f"\n{total}; {sum(r.seconds for r in results):.1f} s\n",
            STYLES["failed" if num["failed"] else "passed"],
        )
    )


def _words(check: str) -> str:
    return check.removeprefix("test_").replace("_", " ")


def _as_data(
    offer: Offer, device: str, results: list[CheckResult], reasons: list[str]
) -> dict[str, Any]:
    return {
        "extension_point": offer.extension_point,
        "provider": offer.provider.name,
        "distribution": offer.plugin.distribution,
        "version": offer.plugin.version,
        "contract": _written_for(offer),
        "device": device,
        "why_not": reasons,
        "passed": not reasons and not any(r.outcome == "failed" for r in results),
        "checks": [dataclasses.asdict(r) for r in results],
    }
