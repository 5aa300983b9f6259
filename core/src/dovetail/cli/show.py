"""`dovetail plugins` and `dovetail explain`: what there is, and what an engine would be made of."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dovetail.config import load_config
from dovetail.plan import Plan
from dovetail.plugins.discovery import Registry, load_registry
from dovetail.resolution import resolve


def show_plugins(*, as_json: bool) -> int:
    """Print installed plugins and offers; exit status 1 if any is broken."""
    registry = load_registry()
    if as_json:
        print(json.dumps(_plugins_as_data(registry), indent=2))
        return 1 if registry.broken else 0
    table = Table("plugin", "distribution", "socket", "offers", "what it is", box=None, pad_edge=False, header_style="bold")
    for plugin in registry.plugins:
        offers = [o for o in registry.offers if o.plugin == plugin]
        owner = f"{plugin.distribution} {plugin.version}"
        if plugin.distribution in registry.broken:
            table.add_row(plugin.name, owner, Text("broken", "red"), "", Text(registry.broken[plugin.distribution]))
        for i, offer in enumerate(offers):
            name, dist = (plugin.name, owner) if i == 0 else ("", "")
            table.add_row(name, dist, offer.socket, offer.provider.name, Text(offer.provider.summary))
        if not offers and plugin.distribution not in registry.broken:
            table.add_row(plugin.name, owner, "", "(nothing)", Text(plugin.summary))
    wide_console().print(table)
    return 1 if registry.broken else 0


def _plugins_as_data(registry: Registry) -> list[dict[str, Any]]:
    return [
        {
            "name": p.name, "distribution": p.distribution, "version": p.version, "summary": p.summary,
            "broken": registry.broken.get(p.distribution),
            "offers": [
                {"socket": o.socket, "name": o.provider.name, "summary": o.provider.summary, "priority": o.provider.priority}
                for o in registry.offers if o.plugin == p
            ],
        }
        for p in registry.plugins
    ]  # fmt: skip


def show_plan(config_file: str | None, values: dict[str, Any], *, as_json: bool) -> int:
    """Print the plan: per socket what is taken, what is not, and why."""
    plan = resolve(load_config(config_file, **values), server=True)
    if as_json:
        print(json.dumps({**msgspec.to_builtins(plan), "fingerprint": plan.fingerprint}, indent=2))
        return 0
    console = wide_console()
    console.print(_head(plan))
    table = Table("socket", "taken", "from", "options", box=None, pad_edge=False, header_style="bold")
    for key, choice in plan.choices.items():
        asked = "" if choice.requested in ("auto", choice.provider) else f" (asked for {choice.requested})"
        options = ", ".join(f"{k}={v}" for k, v in choice.options.items() if v is not None)
        name = f"{key} ({choice.match})" if choice.match else key
        table.add_row(name, choice.provider + asked, f"{choice.distribution} {choice.version}", Text(options))
        for remark in choice.remarks:
            table.add_row("", "", "", Text(remark))
        for other in choice.rejected:
            table.add_row("", Text(f"not {other.provider}", "dim"), Text("; ".join(map(str, other.reasons)), "dim"))
    console.print(table)
    return 0


def _head(plan: Plan) -> Text:
    return Text(
        f"{plan.model}: {plan.architecture}, {plan.dtype} on {plan.device}, up to {plan.max_model_len} tokens a sequence\n"
        f"plan {plan.fingerprint}\n"
    )


def wide_console() -> Console:
    """A terminal's own width; for a pipe or a file, wide enough that nothing is folded."""
    console = Console()
    return console if console.is_terminal else Console(width=200)
