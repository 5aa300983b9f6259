"""Made-up plugins, and plans resolved from what they offer."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from dovetail.composition.resolution import resolve
from dovetail.interfaces.attention import AttentionCapabilities
from dovetail.plan import Choice, Plan, Reason
from dovetail.plugin.config import load_config
from dovetail.plugin.contracts import WrittenFor
from dovetail.plugin.discovery import PluginInfo, Registry, installed_plugins, load_registry
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Provider


def module_with(**hooks: Any) -> ModuleType:
    module = ModuleType("made_up")
    for name, providers in hooks.items():
        setattr(module, name, hookimpl(lambda providers=providers: providers))
    return module


def registry_of(contracts: dict[str, WrittenFor] | None = None, **modules: ModuleType) -> Registry:
    """The built-in plugin, and made-up ones by distribution name, written for these `contracts`."""
    core = next(p for p in installed_plugins() if p.name == "core")
    plugins = [core] + [
        PluginInfo(name, f"dist-{name}", "1.0", "", name, contracts or {}) for name in modules
    ]
    return load_registry(plugins, modules)


def attention(
    name: str, priority: int = 0, reasons: tuple[str, ...] = (), **can: Any
) -> Provider[Any]:
    return Provider(
        name,
        "",
        lambda c, o: None,
        capabilities=AttentionCapabilities(**can),
        priority=priority,
        why_not=lambda context: [Reason(r) for r in reasons],
    )


def resolved(model: Path, *offers: Provider[Any], **values: Any) -> Plan:
    worker = Provider("w", "", lambda c, o: None)
    registry = registry_of(
        x=module_with(dovetail_workers=[worker], dovetail_attention=list(offers))
    )
    return resolve(load_config(model=str(model), device="cpu", **values), registry)


def why_not(choice: Choice, provider: str) -> list[str]:
    """Why a candidate was not taken, in words."""
    return [
        str(r) for other in choice.rejected if other.provider == provider for r in other.reasons
    ]
