"""Write the reference pages that are generated from the code.

Usage: python docs/make.py. A test holds the pages to the code.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.interfaces.drafter import DrafterCapabilities
from dovetail.interfaces.matmul import MatmulCapabilities
from dovetail.interfaces.quantization import QuantizationCapabilities
from dovetail.interfaces.scheduler import SchedulerCapabilities
from dovetail.plugin import hookspecs
from dovetail.plugin.config import EngineConfig
from dovetail.plugin.discovery import Offer, Registry, load_registry
from dovetail.plugin.extension_points import EXTENSION_POINTS, ExtensionPoint
from dovetail_testing.contracts import contract_of
from dovetail_testing.scaffold import interface_of

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
CAPABILITIES: dict[str, type] = {
    "quantization": QuantizationCapabilities,
    "architecture": ArchitectureCapabilities,
    "attention": AttentionCapabilities,
    "matmul": MatmulCapabilities,
    "scheduler": SchedulerCapabilities,
    "speculation": DrafterCapabilities,
}
NOTE = "<!-- Written by docs/make.py from the code: do not edit. -->\n"

FORMS = """\
Every extension point (`worker`, `attention`, `kv_cache`, `scheduler`, …) is `NAME` or
`{use: NAME, on_unsupported: error|fallback, …options}`; `attention` may also be given by kind of layer:
`{full: …, sliding: …}`. An extension point that a plugin adds is set among the options of the extension point it is within:
`prefix_cache: {use: hash, eviction: lfu}`.

`quantization` may be a list of rules; the first that matches a layer's name in the checkpoint applies:
`[{match: "*.mlp.*", use: NAME, …options}, {match: "*.q_proj", use: none}]`. Layers that no rule matches stay as they are
in the checkpoint. A single scheme for a model with plain weights does not quantize `lm_head`; only a rule that names it does.
"""  # noqa: E501


def hooks() -> str:
    """Write docs/hooks.md: every hook, in the order of an engine's life cycle, with its docstring
    and contract version."""
    out = [NOTE, "# Hooks", inspect.getdoc(hookspecs) or ""]
    source = ast.parse(inspect.getsource(hookspecs))
    by_hook, registry = {s.hook: s for s in EXTENSION_POINTS}, load_registry()
    for node in source.body:
        if isinstance(node, ast.FunctionDef):
            extension_point = by_hook.get(node.name)
            out.append(f"## `{node.name}`\n\n{ast.get_docstring(node) or ''}")
            out += (
                [_facts(registry, extension_point), _fields(extension_point)]
                if extension_point
                else []
            )
    out.append("# Hooks of extension points that plugins add")
    out.append(
        "They exist while a provider of the plugin that adds them is selected for the extension"
        " point they are within."
    )
    for name, plugin in registry.added_by.items():
        extension_point = registry.extension_points[name]
        out += [
            f"## `{extension_point.hook}`\n\nAdded by `{plugin.distribution}`.",
            _facts(registry, extension_point),
        ]
    return "\n\n".join(part for part in out if part) + "\n"


def _facts(registry: Registry, extension_point: ExtensionPoint) -> str:
    """Describe an extension point in a table."""
    examples = sorted(
        p.parent.name
        for p in EXAMPLES.glob("*/pyproject.toml")
        if extension_point.name in _extension_points_of(p)
    )
    previous, kit = extension_point.previous, contract_of(extension_point)
    rows = {
        "extension point": f"`{extension_point.name}`: {extension_point.summary}",
        "providers": (
            "any number"
            if extension_point.many
            else "one provider, or none"
            if extension_point.optional
            else "one provider"
        ),
        "within": f"`{extension_point.within}`" if extension_point.within else "",
        "interface": _link(interface_of(registry, extension_point)),
        "contract": extension_point.contract,
        "previous contract": (
            f"{previous.version}, served until {previous.until}: now {previous.changed}"
            if previous
            else "none"
        ),
        "contract class": f"`{kit.__name__}` of {_link(kit.__module__)}" if kit else "none",
        "template": f"`dovetail new-plugin {extension_point.name} NAME`",
        "examples": ", ".join(f"[{name}](../examples/{name})" for name in examples),
    }
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {what} | {text} |" for what, text in rows.items() if text)]
    )


def _link(module: str) -> str:
    """Link a module to its file."""
    file = Path(inspect.getfile(importlib.import_module(module))).resolve().relative_to(DOCS.parent)
    return f"[`{module}`](../{file})"


def _extension_points_of(pyproject: Path) -> set[str]:
    """Return the extension points that a package was written for, from its metadata."""
    return set(
        tomllib.loads(pyproject.read_text())["project"]["entry-points"].get(
            "dovetail.contracts", {}
        )
    )


def _fields(extension_point: ExtensionPoint) -> str:
    """Describe the capabilities of an extension point's providers and their common options."""
    out = []
    if declared := CAPABILITIES.get(extension_point.name):
        said = _docstrings(declared)
        out += [
            f"Fields of `{declared.__name__}`:\n",
            "| field | type | default | |",
            "|---|---|---|---|",
        ]
        for f in dataclasses.fields(declared):
            kind = str(f.type).replace("|", "\\|")
            default = "–" if f.default is dataclasses.MISSING else f"`{f.default!r}`"
            out.append(f"| `{f.name}` | {kind} | {default} | {said.get(f.name, '')} |")
    if extension_point.options.model_fields:
        names = ", ".join(f"`{name}`" for name in extension_point.options.model_fields)
        out.append(f"\nOptions are a subclass of `{extension_point.options.__name__}`: {names}.")
    return "\n".join(out).strip()


def _docstrings(kind: type) -> dict[str, str]:
    """Return the docstring of each field, by name."""
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(kind)).body
        if isinstance(node, ast.ClassDef)
    )
    return {
        field.target.id: " ".join(said.value.value.split())
        for field, said in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(said, ast.Expr)
        and isinstance(said.value, ast.Constant)
        and isinstance(said.value.value, str)
    }


def config() -> str:
    """Write docs/config.md: every key of an engine config, and every option of the providers in
    this repository."""
    out = [
        NOTE,
        "# Configuration\n",
        inspect.getdoc(EngineConfig) or "",
        "",
        *_table(EngineConfig),
        "",
    ]
    out.append(FORMS)
    for offer in _offers():
        if offer.provider.options.model_fields:
            out.append(
                f"## `{offer.extension_point}: {offer.provider.name}`"
                f" ({offer.plugin.distribution})\n"
            )
            out += [f"{offer.provider.summary}.", "", *_table(offer.provider.options), ""]
    return "\n".join(out)


def plugins() -> str:
    """Write docs/plugins.md: the providers of each distribution, and their capabilities."""
    out = [
        NOTE,
        "# Plugins in this repository\n",
        "| extension point | provider | distribution | priority | summary |",
        "|" + "---|" * 5,
    ]
    for o in _offers():
        p = o.provider
        out += [
            f"| {o.extension_point} | `{p.name}` | {o.plugin.distribution} | {p.priority} |"
            f" {p.summary} |"
        ]
    out += _declared("attention", AttentionCapabilities) + _declared(
        "quantization", QuantizationCapabilities
    )
    out += _declared("matmul", MatmulCapabilities) + _declared(
        "architecture", ArchitectureCapabilities
    )
    return "\n".join(out) + "\n"


def _declared(extension_point: str, capabilities: Any) -> list[str]:
    """Build a table of the capabilities of an extension point's providers."""
    offers = [o for o in _offers() if isinstance(o.provider.capabilities, capabilities)]
    out = [
        f"\n## What {extension_point} providers declare\n",
        "| | " + " | ".join(f"`{o.provider.name}`" for o in offers) + " |",
    ]
    out.append("|---" * (len(offers) + 1) + "|")
    for name, field in capabilities.__dataclass_fields__.items():
        if name == "examples":
            continue
        none = "any" if "tuple" in str(field.type) else "–"
        out.append(
            f"| {name} | "
            + " | ".join(_cell(getattr(o.provider.capabilities, name), none) for o in offers)
            + " |"
        )
    return out


def _offers() -> list[Offer]:
    """Return the offers of the packages in this repository, whatever else is installed."""
    ours = {f"dovetail-{p.name.replace('_', '-')}" for p in (DOCS.parent / "plugins").iterdir()} | {
        "dovetail-core"
    }
    offers = [o for o in load_registry().offers if o.plugin.distribution in ours]
    order = list(load_registry().extension_points)
    return sorted(
        offers,
        key=lambda o: (order.index(o.extension_point), -o.provider.priority, o.provider.name),
    )


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
        kind = (
            (field.annotation.__name__ if plain else str(field.annotation))
            .replace("typing.", "")
            .replace("|", "\\|")
        )
        default = getattr(
            field.default, "use", "auto" if isinstance(field.default, BaseModel) else field.default
        )
        rows.append(f"| `{name}` | {kind} | {default} | {field.description or ''} |")
    return rows


PAGES = {"hooks.md": hooks, "config.md": config, "plugins.md": plugins}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
