from __future__ import annotations
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from dovetail.adaptive import Adaptive, EverySequence
from dovetail.attestation import Attestation
from dovetail.attribution import ENGINE, Attribution
from dovetail.checks import CheckedDrafter, CheckedKVCache, CheckedScheduler, CheckedWorker
from dovetail.config import EngineConfig
from dovetail.contracts import adapted
from dovetail.engine import Engine, OverlappedEngine
from dovetail.errors import CheckpointError, ConfigError, DovetailError, OutOfMemory, PluginError
from dovetail.facts import DeviceFacts, ModelFacts, device_facts, model_facts
from dovetail.interfaces.drafter import Drafter
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.interfaces.quantization import PLAIN, QuantizationCapabilities
from dovetail.interfaces.server import Server
from dovetail.interfaces.worker import DescribingWorker, Progress, TieringWorker, Worker, WorkerCapabilities
from dovetail.kv_sizes import size_cache, size_host_tier
from dovetail.plan import Plan
from dovetail.plugins.discovery import Registry, load_registry
from dovetail.plugins.selection import find
from dovetail.shadow import ShadowReport
from dovetail.speculation import Speculation
from dovetail.step_costs import measure
from dovetail.types import KVGroup
from dovetail.weights import LayerWeights

@dataclass(frozen=True)
class BuildContext:
    plan: Plan
    registry: Registry
    device: DeviceFacts
    model: ModelFacts
    prefix_cache: PrefixCache | None = None
    kv: KVCacheManager | None = None
    kv_groups: tuple[KVGroup, ...] = ()
    num_blocks: tuple[int, ...] = ()
    built: dict[str, object] = field(default_factory=dict)
    attestation: Attestation = field(default_factory=Attestation)
    num_host_blocks: tuple[int, ...] = ()

    def option(self, key: str, name: str) -> Any:
        ...

    def capabilities(self, key: str) -> Any:
        ...

    def build(self, key: str, options: Mapping[str, Any] | None=None) -> Any:
        ...

    def name(self, key: str) -> str:
        ...

    def build_all(self, socket: str) -> dict[str, Any]:
        ...

def build_engine(plan: Plan, progress: Progress, registry: Registry | None=None, attestation: Attestation | None=None) -> Engine:
    ...

def weights_of(plan: Plan, registry: Registry | None=None, running: Worker | None=None) -> list[LayerWeights]:
    ...

def shadow_report_of(worker: Any) -> ShadowReport | None:
    ...

def build_server(config: EngineConfig, plan: Plan, registry: Registry | None=None) -> Server:
    ...
