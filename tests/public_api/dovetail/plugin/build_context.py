from __future__ import annotations
from collections.abc import Mapping
from typing import Any, Protocol
from dovetail.facts import DeviceFacts, ModelFacts
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.plan import Plan
from dovetail.types import KVGroup

class BuildContext(Protocol):

    @property
    def plan(self) -> Plan:
        ...

    @property
    def device(self) -> DeviceFacts:
        ...

    @property
    def model(self) -> ModelFacts:
        ...

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        ...

    @property
    def num_blocks(self) -> tuple[int, ...]:
        ...

    @property
    def num_host_blocks(self) -> tuple[int, ...]:
        ...

    @property
    def prefix_cache(self) -> PrefixCache | None:
        ...

    @property
    def kv(self) -> KVCacheManager | None:
        ...

    def option(self, key: str, name: str) -> Any:
        ...

    def capabilities(self, key: str) -> Any:
        ...

    def name(self, key: str) -> str:
        ...

    def build(self, key: str, options: Mapping[str, Any] | None=None) -> Any:
        ...

    def build_all(self, extension_point: str) -> dict[str, Any]:
        ...

    def for_model(self, model: ModelFacts) -> BuildContext:
        ...

    def responsible(self, error: BaseException, extension_point: str, module: str='') -> str:
        ...
