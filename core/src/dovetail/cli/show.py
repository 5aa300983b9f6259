"""Implement `dovetail plugins` and `dovetail explain`: show the installed plugins and the plan of
an engine."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from dovetail.assembly.compose import weights_of
from dovetail.composition.resolution import resolve
from dovetail.console import wide_console
from dovetail.interfaces.weights import LayerWeights, alike
from dovetail.plan import Choice, Plan, Reason
from dovetail.plugin.config import load_config
from dovetail.plugin.discovery import Offer, Registry, load_registry


def show_plugins(*, as_json: bool) -> int:
    """Print the installed plugins and their providers. The exit status is 1 if any is broken."""
    registry = load_registry()
    if as_json:
        print(json.dumps(_plugins_as_data(registry), indent=2))
        return 1 if registry.broken else 0
    columns = ("plugin", "distribution", "extension point", "contract", "provider", "summary")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    deprecated: dict[str, str] = {}
    for plugin in registry.plugins:
        offers = [o for o in registry.offers if o.plugin == plugin]
        owner = f"{plugin.distribution} {plugin.version}"
        if plugin.distribution in registry.broken:
            table.add_row(
                plugin.name,
                owner,
                Text("broken", "red"),
                "",
                "",
                Text(registry.broken[plugin.distribution]),
            )
        for i, offer in enumerate(offers):
            name, dist = (plugin.name, owner) if i == 0 else ("", "")
            written = plugin.written_for(offer.extension_point)
            contract = Text(str(written or "not stated"))
            if why := _contract_remark(registry, offer):
                contract.stylize("yellow")
                deprecated[f"{plugin.distribution}: {offer.extension_point}"] = why
            table.add_row(
                name,
                dist,
                offer.extension_point,
                contract,
                offer.provider.name,
                Text(offer.provider.summary),
            )
        if not offers and plugin.distribution not in registry.broken:
            table.add_row(plugin.name, owner, "", "", "(none)", Text(plugin.summary))
    console = wide_console()
    console.print(table)
    for where, why in deprecated.items():
        console.print(Text(f"\n{where}: {why}", "yellow"))
    return 1 if registry.broken else 0


def _contract_remark(registry: Registry, offer: Offer) -> str | None:
    """Return a remark on the contract version that a plugin was written for, if one is needed."""
    extension_point = registry.extension_points[offer.extension_point]
    version = extension_point.served(offer.plugin.written_for(offer.extension_point))
    return str(version) if isinstance(version, Reason) else extension_point.deprecation(version)


def _plugins_as_data(registry: Registry) -> list[dict[str, Any]]:
    return [
        {
            "name": p.name,
            "distribution": p.distribution,
            "version": p.version,
            "summary": p.summary,
            "broken": registry.broken.get(p.distribution),
            "offers": [
                {
                    "extension_point": o.extension_point,
                    "name": o.provider.name,
                    "summary": o.provider.summary,
                    "priority": o.provider.priority,
                    "contract": str(p.written_for(o.extension_point) or ""),
                    "contract_remark": _contract_remark(registry, o),
                }
                for o in registry.offers
                if o.plugin == p
            ],
        }
        for p in registry.plugins
    ]


def show_plan(config_file: str | None, values: dict[str, Any], *, as_json: bool) -> int:
    """Print the plan: the selected and the rejected providers of each extension point, with
    reasons."""
    registry = load_registry()
    plan = resolve(load_config(config_file, **values), registry, server=True)
    layers = weights_of(plan, registry)
    if as_json:
        more = {"weights": msgspec.to_builtins(layers)} if layers else {}
        print(
            json.dumps(
                {**msgspec.to_builtins(plan), "fingerprint": plan.fingerprint, **more}, indent=2
            )
        )
        return 0
    console = wide_console()
    console.print(plan_tree(plan))
    if layers:
        console.print(weights_table(layers, plan.dtype))
    return 0


def weights_table(layers: list[LayerWeights], dtype: str) -> Table:
    """Build a table with a line for each group of alike layers. `dtype` is that of the plan."""
    total, plain = (
        sum(layer.nbytes for layer in layers),
        sum(plain_bytes(layer, dtype) for layer in layers),
    )
    title = (
        f"weights of linear layers: {size(total)}, {total / plain:.0%} of {size(plain)} in {dtype}"
    )
    columns = (
        "layers",
        "outputs × inputs",
        "scheme",
        "stored as",
        "GEMM backend",
        "size each",
        "total",
    )
    table = Table(
        *columns,
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for group in alike(layers):
        one = group.one
        shape, form = (
            f"{one.out_features} × {one.in_features}",
            f"{one.form}: {one.remark}" if one.remark else one.form,
        )
        cells = (
            Text(group.names),
            shape,
            one.scheme,
            Text(form),
            one.gemm_backend,
            size(one.nbytes),
            size(group.nbytes),
        )
        table.add_row(*cells)
    return table


def plain_bytes(layer: LayerWeights, dtype: str) -> int:
    return layer.in_features * layer.out_features * (4 if dtype == "float32" else 2)


def size(nbytes: int) -> str:
    """Format a number of bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return (
                f"{nbytes / scale:.3g} {unit}"
                if nbytes < 1000 * scale
                else f"{nbytes / scale:.0f} {unit}"
            )
    return f"{nbytes} B"


def plan_tree(plan: Plan) -> Tree:
    """Build a tree of the extension points: the selected provider with its resolved options, and
    the rejected ones with the reasons and what would help."""
    model = Text.assemble(
        (plan.model, "bold"), f"  {plan.architecture}, {plan.dtype} on {plan.device}"
    )
    if plan.revision is not None:
        model.append(f" at {plan.revision}", "dim")
    model.append(
        f", up to {plan.max_model_len} tokens per sequence   plan {plan.fingerprint}", "dim"
    )
    if plan.draft is not None:
        model.append(f"\ndraft model {plan.draft.model}  {plan.draft.architecture}")
    tree = Tree(model, guide_style="dim")
    width = max(len(_label(key, choice)) for key, choice in plan.choices.items())
    for key, choice in plan.choices.items():
        extension_point = tree.add(_header(key, choice, width))
        for option, value in choice.options.items():
            if value is not None:
                extension_point.add(Text.assemble((f"{option}: ", "dim"), str(value)))
        for remark in choice.remarks:
            extension_point.add(Text(remark, "cyan"))
        for other in choice.rejected:
            node = extension_point.add(
                Text.assemble(("not ", "dim"), other.provider, (f"  {other.distribution}", "dim"))
            )
            for reason in other.reasons:
                line = Text.assemble((f"[{reason.code}] ", "yellow"), reason.text)
                if reason.hint:
                    line.append(f"  → {reason.hint}", "green")
                node.add(line)
    return tree


def _label(key: str, choice: Choice) -> str:
    return f"{key} ({choice.match})" if choice.match else key


def _header(key: str, choice: Choice, width: int) -> Text:
    line = Text.assemble((f"{_label(key, choice):{width}}  ", "bold"))
    if choice.is_empty:
        return line.append("none", "dim")
    line.append(choice.provider, "bold green")
    line.append(f"  {choice.distribution} {choice.version}, contract {choice.contract}", "dim")
    if choice.requested not in ("auto", choice.provider):
        line.append(f"  requested: {choice.requested}", "yellow")
    return line
