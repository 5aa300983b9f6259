"""Define what a provider's `build` receives: the plan, facts, and the objects built before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from dovetail.facts import DeviceFacts, ModelFacts
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.plan import Plan
from dovetail.types import KVGroup


class BuildContext(Protocol):
    """The read-only context in which a provider is built."""

    @property
    def plan(self) -> Plan: ...

    @property
    def device(self) -> DeviceFacts: ...

    @property
    def model(self) -> ModelFacts: ...

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """The KV groups of the worker. For the KV-cache manager."""

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Number of blocks per group, the null block included. For the KV-cache manager."""

    @property
    def num_host_blocks(self) -> tuple[int, ...]:
        """Number of blocks per group in host memory; empty without a host tier. For the prefix
        cache and the KV-cache manager."""

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """The prefix cache, if there is one. For the KV-cache manager."""

    @property
    def kv(self) -> KVCacheManager | None:
        """The KV-cache manager. For the scheduler."""

    def option(self, key: str, name: str) -> Any:
        """Return an option of another extension point's provider. A worker needs the block size of
        the KV cache, for example."""

    def capabilities(self, key: str) -> Any:
        """Return the declared capabilities of the selected provider of an extension point."""

    def name(self, key: str) -> str:
        """Return `dist:name` of the selected provider of an extension point."""

    def build(self, key: str, options: Mapping[str, Any] | None = None) -> Any:
        """Build the selected provider of an extension point; return None if none is selected.

        `options`, if given, replace those of the plan, in which secrets are masked. Raises
        `PluginError`, which names the provider; no other provider is tried.
        """

    def build_all(self, extension_point: str) -> dict[str, Any]:
        """Build all selected providers of an extension point that has several, by their names."""

    def for_model(self, model: ModelFacts) -> BuildContext:
        """Return a context for another model that runs beside the plan's, such as a draft
        model."""

    def responsible(self, error: BaseException, extension_point: str, module: str = "") -> str:
        """Return which of an extension point's providers raised an error, as "routes (dist:name)",
        or an empty string if this is not known.

        `module` is a module of the code that failed, if the error itself does not show it.
        """
