"""Write the reference pages that the code determines.  Usage: python docs/make.py   (a test holds them to the code)"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dovetail import hookspecs
from dovetail.config import EngineConfig
from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.interfaces.quantization import QuantizationCapabilities
from dovetail.plugins.discovery import Offer, load_registry
from dovetail.sockets import SOCKETS

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/make.py from the code: do not edit. -->\n"

FORMS = """\
Every socket (`worker`, `attention`, `kv_cache`, `scheduler`, …) is `NAME` or
`{use: NAME, on_unsupported: error|fallback, …options}`; `attention` may also be given by kind of layer:
`{full: …, sliding: …}`. A socket that a plugin adds is set among the options of the socket it is within:
`prefix_cache: {use: hash, eviction: lfu}`.

`quantization` may be rules, of which the first that matches a layer's name in the checkpoint counts:
`[{match: "*.mlp.*", use: NAME, …options}, {match: "*.q_proj", use: none}]`. Layers that none matches are as the checkpoint
has them. One scheme for a whole model of plain weights leaves `lm_head` as it is: only a rule that names that quantizes it.
"""


def hooks() -> str:
    """docs/hooks.md: every hook, in the order of an engine's life, with its docstring and its contract's version."""
    out = [NOTE, "# Hooks", inspect.getdoc(hookspecs) or ""]
    source = ast.parse(inspect.getsource(hookspecs))
    by_hook = {s.hook: s for s in SOCKETS}
    for node in source.body:
        if isinstance(node, ast.FunctionDef):
            socket = by_hook.get(node.name)
            of = f"Socket `{socket.name}`: {socket.summary}. Contract {socket.contract}.\n\n" if socket else ""
            out.append(f"## `{node.name}`\n\n{of}{ast.get_docstring(node) or ''}")
    added = load_registry()
    out.append("## Hooks of sockets that plugins add")
    for name, plugin in added.added_by.items():
        s = added.sockets[name]
        where = f"`{s.hook}` (plugin `{plugin.name}`): socket `{name}`, within `{s.within}`"
        out.append(f"{where}: {s.summary}. Contract {s.contract}.")
    return "\n\n".join(out) + "\n"


def config() -> str:
    """docs/config.md: every key of a composition file, and every option of the providers in this repository."""
    out = [NOTE, "# Configuration\n", inspect.getdoc(EngineConfig) or "", "", *_table(EngineConfig), ""]
    out.append(FORMS)
    for offer in _offers():
        if offer.provider.options.model_fields:
            out.append(f"## `{offer.socket}: {offer.provider.name}` ({offer.plugin.distribution})\n")
            out += [f"{offer.provider.summary}.", "", *_table(offer.provider.options), ""]
    return "\n".join(out)


def plugins() -> str:
    """docs/plugins.md: who offers what, and what those that are chosen by capabilities declare."""
    out = [NOTE, "# Plugins in this repository\n", "| socket | provider | from | priority | what it is |", "|" + "---|" * 5]
    for o in _offers():
        p = o.provider
        out += [f"| {o.socket} | `{p.name}` | {o.plugin.distribution} | {p.priority} | {p.summary} |"]
    out += _declared("attention", AttentionCapabilities) + _declared("quantization", QuantizationCapabilities)
    out += _declared("architecture", ArchitectureCapabilities)
    return "\n".join(out) + "\n"


def _declared(socket: str, capabilities: Any) -> list[str]:
    """A table: what each provider of a socket declares."""
    offers = [o for o in _offers() if isinstance(o.provider.capabilities, capabilities)]
    out = [f"\n## What {socket} providers declare\n", "| | " + " | ".join(f"`{o.provider.name}`" for o in offers) + " |"]
    out.append("|---" * (len(offers) + 1) + "|")
    for name, field in capabilities.__dataclass_fields__.items():
        if name == "examples":
            continue
        none = "any" if "tuple" in str(field.type) else "–"
        out.append(f"| {name} | " + " | ".join(_cell(getattr(o.provider.capabilities, name), none) for o in offers) + " |")
    return out


def _offers() -> list[Offer]:
    """Of the packages in this repository, whatever else is installed."""
    ours = {f"dovetail-{p.name.replace('_', '-')}" for p in (DOCS.parent / "plugins").iterdir()} | {"dovetail-core"}
    offers = [o for o in load_registry().offers if o.plugin.distribution in ours]
    order = list(load_registry().sockets)
    return sorted(offers, key=lambda o: (order.index(o.socket), -o.provider.priority, o.provider.name))


def _cell(value: object, none: str) -> str:
    if value is None:
        return none
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _table(model: type[BaseModel]) -> list[str]:
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        plain = isinstance(field.annotation, type)
        kind = (field.annotation.__name__ if plain else str(field.annotation)).replace("typing.", "").replace("|", "\\|")
        default = "auto" if isinstance(field.default, BaseModel) else field.default
        rows.append(f"| `{name}` | {kind} | {default} | {field.description or ''} |")
    return rows


PAGES = {"hooks.md": hooks, "config.md": config, "plugins.md": plugins}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
