"""What a provider's `build` is given: the plan, facts, and what has been built before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from dovetail.facts import DeviceFacts, ModelFacts
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.plan import Plan
from dovetail.types import KVGroup


class BuildContext(Protocol):
    """What a provider may ask while it is built. Read-only."""

    @property
    def plan(self) -> Plan: ...

    @property
    def device(self) -> DeviceFacts: ...

    @property
    def model(self) -> ModelFacts: ...

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """For the KV-cache manager: the worker's groups."""

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """For the KV-cache manager: blocks per group, the null block included."""

    @property
    def num_host_blocks(self) -> tuple[int, ...]:
        """For the prefix cache and the manager: blocks per group in host memory; empty without a
        host tier."""

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """For the KV-cache manager."""

    @property
    def kv(self) -> KVCacheManager | None:
        """For the scheduler."""

    def option(self, key: str, name: str) -> Any:
        """An option of another extension point's choice, such as the KV cache's block size for the
        worker."""

    def capabilities(self, key: str) -> Any:
        """What the provider that the plan chose for an extension point declares."""

    def name(self, key: str) -> str:
        """`dist:name` of what the plan chose for an extension point."""

    def build(self, key: str, options: Mapping[str, Any] | None = None) -> Any:
        """Build what the plan chose for an extension point; None where it is empty.

        `options`, if given, are used in place of the plan's, in which secrets are masked. Raises
        `PluginError`, which names the provider; there is no second choice.
        """

    def build_all(self, extension_point: str) -> dict[str, Any]:
        """What the plan chose for an extension point that takes many, by the providers' names."""

    def for_model(self, model: ModelFacts) -> BuildContext:
        """The same, for another model that runs beside the plan's, such as one that drafts."""

    def responsible(self, error: BaseException, extension_point: str, module: str = "") -> str:
        """Which of an extension point's providers an error comes from: "routes (dist:name)"; empty
        if that cannot be told.

        `module` is a module of the code that failed, where the error itself does not show it.
        """
