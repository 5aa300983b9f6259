"""Find the installed plugins (from metadata, importing nothing) and what they offer (importing
their light root modules)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

import pluggy

from dovetail.errors import PluginError
from dovetail.plugin import contracts as contract_versions
from dovetail.plugin import hookspecs
from dovetail.plugin.config import EngineConfig
from dovetail.plugin.contracts import WrittenFor
from dovetail.plugin.extension_points import EXTENSION_POINTS, ExtensionPoint
from dovetail.plugin.provider import Provider

GROUP = "dovetail"


@dataclass(frozen=True)
class PluginInfo:
    """One entry point, as described by the metadata of its distribution."""

    name: str
    distribution: str
    version: str
    summary: str
    module: str
    contracts: Mapping[str, WrittenFor] = field(default_factory=dict)
    """Contract versions that the plugin was written for, by extension point."""
    error: str = ""
    """Error in its metadata, or an empty string."""

    def written_for(self, extension_point: str) -> WrittenFor | None:
        """Return the versions that the plugin was written for. None means that the metadata does
        not say, and the current version is assumed."""
        return self.contracts.get(extension_point)


@dataclass(frozen=True)
class Offer:
    """A provider and the plugin that offers it."""

    extension_point: str
    provider: Provider[object]
    plugin: PluginInfo

    @property
    def qualified_name(self) -> str:
        return f"{self.plugin.distribution}:{self.provider.name}"


@dataclass
class Registry:
    """The offers of all installed plugins. Each engine has its own registry: nothing is
    process-wide."""

    plugins: list[PluginInfo]
    extension_points: dict[str, ExtensionPoint] = field(
        default_factory=lambda: {s.name: s for s in EXTENSION_POINTS}
    )
    """The extension points of the core, followed by those that plugins add."""
    added_by: dict[str, PluginInfo] = field(default_factory=dict)
    """The plugin that adds an extension point, by extension point."""
    offers: list[Offer] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    """Why a plugin could not be loaded, by distribution."""

    def of(self, extension_point: str) -> list[Offer]:
        return [o for o in self.offers if o.extension_point == extension_point]


def installed_plugins() -> list[PluginInfo]:
    """Return every entry point of the group, sorted by name. Imports nothing."""
    found = []
    contracts: dict[str, dict[str, WrittenFor]] = {}
    errors: dict[str, str] = {}
    for entry in importlib.metadata.entry_points(group=contract_versions.GROUP):
        if entry.dist is not None:
            try:
                contracts.setdefault(entry.dist.name, {})[entry.name] = contract_versions.parse(
                    entry.value
                )
            except PluginError as e:
                errors[entry.dist.name] = f"contract {entry.name}: {e.message}"
    for entry in importlib.metadata.entry_points(group=GROUP):
        dist = entry.dist
        meta = dist.metadata if dist is not None else None
        found.append(
            PluginInfo(
                entry.name,
                dist.name if dist is not None else "?",
                dist.version if dist is not None else "?",
                str(meta["Summary"] or "") if meta is not None else "",
                entry.value,
                contracts.get(dist.name, {}) if dist is not None else {},
                errors.get(dist.name, "") if dist is not None else "",
            )
        )
    return sorted(found, key=lambda p: (p.name, p.distribution))


def load_registry(
    plugins: list[PluginInfo] | None = None, modules: dict[str, ModuleType] | None = None
) -> Registry:
    """Import each plugin's root module, in its own try block, and collect what it offers.

    `modules` has already imported modules by `PluginInfo.module`, for tests and for code that
    registers a plugin without installing it. Raises `PluginError`, naming both owners, if two
    plugins have the same name.
    """
    plugins = installed_plugins() if plugins is None else plugins
    _reject_duplicates([(p.name, p.distribution) for p in plugins], "plugin")
    registry = Registry(plugins)
    working = list(plugins)
    for collect in (_add_extension_points, _add_offers):
        for plugin in list(working):
            try:
                if plugin.error:
                    raise PluginError(plugin.error)
                collect(
                    registry,
                    plugin,
                    (modules or {}).get(plugin.module) or importlib.import_module(plugin.module),
                )
            except Exception as e:
                registry.broken[plugin.distribution] = f"{type(e).__name__}: {e}"
                working.remove(plugin)
    for name in registry.extension_points:
        _reject_duplicates(
            [(o.qualified_name, o.plugin.name) for o in registry.of(name)], f"{name} provider"
        )
    return registry


def _add_extension_points(registry: Registry, plugin: PluginInfo, module: ModuleType) -> None:
    for extension_points in _manager(plugin, module, []).hook.dovetail_extension_points():
        for extension_point in extension_points:
            in_use = (
                extension_point.name in registry.extension_points
                or extension_point.name in EngineConfig.model_fields
            )
            if in_use or extension_point.hook in {
                s.hook for s in registry.extension_points.values()
            }:
                raise PluginError(
                    f"the extension point {extension_point.name!r} (hook {extension_point.hook})"
                    " has a name that is already in use"
                )
            registry.extension_points[extension_point.name] = extension_point
            registry.added_by[extension_point.name] = plugin


def _add_offers(registry: Registry, plugin: PluginInfo, module: ModuleType) -> None:
    added = [registry.extension_points[name] for name in registry.added_by]
    manager = _manager(plugin, module, added)
    manager.check_pending()  # raises an error for a misspelt hook
    offers = []
    for extension_point in registry.extension_points.values():
        for provider in (
            p for result in getattr(manager.hook, extension_point.hook)() for p in result
        ):
            if not isinstance(provider, Provider):
                raise PluginError(
                    f"{extension_point.hook} returned {type(provider).__name__}, not a Provider"
                )
            if provider.name == "auto" or (provider.name == "none" and extension_point.optional):
                raise PluginError(
                    f"{provider.name!r} cannot be the name of a provider: it has a meaning in an"
                    " engine config"
                )
            if not issubclass(provider.options, extension_point.options):
                base = f"{extension_point.options.__module__}.{extension_point.options.__name__}"
                raise PluginError(f"the options of {provider.name} must be a subclass of {base}")
            offers.append(Offer(extension_point.name, provider, plugin))
    registry.offers += offers


def _offer_nothing() -> list[Provider[object]]:
    """Default of the hook of an added extension point."""
    return []


def _manager(
    plugin: PluginInfo, module: ModuleType, added: list[ExtensionPoint]
) -> pluggy.PluginManager:
    """Build a plugin manager with one plugin's hooks, including those of added extension points."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if added:
        manager.add_hookspecs(
            type(
                "AddedExtensionPoints",
                (),
                {s.hook: hookspecs.hookspec(_offer_nothing) for s in added},
            )
        )
    manager.register(module, plugin.name)
    return manager


def _reject_duplicates(owners: list[tuple[str, str]], what: str) -> None:
    seen: dict[str, str] = {}
    for name, owner in owners:
        if name in seen:
            raise PluginError(
                f"two {what}s are named {name!r}: one from {seen[name]}, one from {owner};"
                " uninstall one"
            )
        seen[name] = owner
