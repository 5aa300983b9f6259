"""Build an engine from a plan.

`resolve` builds the plan, once, in the front-end. `build_engine` runs in the process that hosts the
engine, from the plan alone. A plan may be sent between processes; its fingerprint verifies that
both have the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from dovetail.assembly.attestation import Attestation
from dovetail.assembly.attribution import ENGINE, Attribution
from dovetail.assembly.kv_sizes import size_cache, size_host_tier
from dovetail.composition.selection import find
from dovetail.engine.adaptive import Adaptive, EverySequence
from dovetail.engine.checks import CheckedDrafter, CheckedKVCache, CheckedScheduler, CheckedWorker
from dovetail.engine.engine import Engine, OverlappedEngine
from dovetail.engine.speculation import Speculation
from dovetail.engine.step_costs import NewEngine, measure
from dovetail.errors import CheckpointError, ConfigError, DovetailError, OutOfMemory, PluginError
from dovetail.facts import DeviceFacts, ModelFacts, device_facts, model_facts
from dovetail.interfaces.clock import Clock, SystemClock
from dovetail.interfaces.drafter import Drafter
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.interfaces.quantization import PLAIN, QuantizationCapabilities
from dovetail.interfaces.server import Server
from dovetail.interfaces.shadow import ShadowReport
from dovetail.interfaces.weights import LayerWeights
from dovetail.interfaces.worker import (
    DescribingWorker,
    Progress,
    TieringWorker,
    Worker,
    WorkerCapabilities,
)
from dovetail.native import bounded_spinning
from dovetail.plan import Plan
from dovetail.plugin.config import EngineConfig
from dovetail.plugin.discovery import Registry, load_registry
from dovetail.types import KVGroup


@dataclass(frozen=True)
class PlanContext:
    """The `BuildContext` of a plan: builds the selected providers and records what they built."""

    plan: Plan
    registry: Registry
    device: DeviceFacts
    model: ModelFacts
    prefix_cache: PrefixCache | None = None
    """The prefix cache, for the KV-cache manager."""
    kv: KVCacheManager | None = None
    """The KV-cache manager, for the scheduler."""
    kv_groups: tuple[KVGroup, ...] = ()
    num_blocks: tuple[int, ...] = ()
    """Number of blocks per group, the null block included, for the KV-cache manager."""
    built: dict[str, object] = field(default_factory=dict)
    """Objects that providers have built, by plan key."""
    attestation: Attestation = field(default_factory=Attestation)
    """Records which of these objects are used."""
    num_host_blocks: tuple[int, ...] = ()
    """Number of blocks per group in host memory, for the prefix cache and the KV-cache manager;
    empty without a host tier."""

    def option(self, key: str, name: str) -> Any:
        return self.plan.choices[key].options[name]

    def capabilities(self, key: str) -> Any:
        return find(self.registry, self.plan.choices[key]).provider.capabilities

    def build(self, key: str, options: Mapping[str, Any] | None = None) -> Any:
        choice = self.plan.choices[key]
        if choice.is_empty:
            return None
        offer = find(self.registry, choice)
        try:
            given = choice.options if options is None else options
            built = offer.provider.build(self, offer.provider.options.model_validate(given))
            extension_point = self.registry.extension_points[choice.extension_point]
            self.built[key] = built
            built = extension_point.adapted(choice.contract, built)
        except (CheckpointError, ConfigError, OutOfMemory, PluginError):
            raise
        except Exception as e:
            raise PluginError(
                f"{key}: {offer.qualified_name} could not be built: {type(e).__name__}: {e}",
                provider=offer.qualified_name,
            ) from e
        if missing := extension_point.missing(built):
            what = f"built {type(built).__name__}, which lacks {', '.join(missing)}"
            raise PluginError(
                f"{key}: {offer.qualified_name} {what}", provider=offer.qualified_name
            )
        self.attestation.watch(key, extension_point, built)
        return built

    def name(self, key: str) -> str:
        return self.plan.choices[key].qualified_name

    def build_all(self, extension_point: str) -> dict[str, Any]:
        return {
            c.provider: self.build(key)
            for key, c in self.plan.choices.items()
            if c.extension_point == extension_point
        }

    def for_model(self, model: ModelFacts) -> PlanContext:
        return replace(self, model=model)

    def responsible(self, error: BaseException, extension_point: str, module: str = "") -> str:
        attribution = Attribution(self.plan, self.registry, self.built)
        return attribution.seen(error, extension_point) or attribution.of_module(
            module, extension_point
        )


def build_engine(
    plan: Plan,
    progress: Progress,
    registry: Registry | None = None,
    attestation: Attestation | None = None,
) -> Engine:
    """Build, load and warm up the engine of a plan. This takes seconds to minutes, reported to
    `progress`; `attestation` observes the providers."""
    attestation = attestation or Attestation()
    registry = load_registry() if registry is None else registry
    facts, model = device_facts(), model_facts(Path(plan.folder))
    context = PlanContext(plan, registry, facts, model, attestation=attestation)
    responsible = Attribution(plan, registry, context.built)
    with bounded_spinning():  # before any module imports torch
        worker: Worker = context.build("worker")
    try:
        worker.load(progress)
        groups = worker.kv_groups()
        limits = plan.choices["scheduler"].options
        num_blocks = size_cache(
            plan,
            groups,
            worker.kv_memory(),
            limits["max_num_seqs"],
            limits["max_num_batched_tokens"],
        )
        worker.allocate(num_blocks)
        num_host_blocks = size_host_tier(plan, groups, num_blocks)
        if num_host_blocks:
            # The plan selected a worker that declares `host_tier`.
            cast(TieringWorker, worker).allocate_host(num_host_blocks)
        worker.warm_up(progress)
        context = replace(
            context,
            kv_groups=tuple(groups),
            num_blocks=tuple(num_blocks),
            num_host_blocks=tuple(num_host_blocks),
        )
        context = replace(context, prefix_cache=context.build("prefix_cache"))
        kv: KVCacheManager = CheckedKVCache(context.build("kv_cache"), context.name("kv_cache"))
        context = replace(context, kv=kv)
        clock = SystemClock()
        scheduler = CheckedScheduler(
            context.build("scheduler"),
            context.name("scheduler"),
            responsible,
            limits["max_num_batched_tokens"],
            clock,
        )
        checked = CheckedWorker(worker, context.name("worker"), model.vocab_size)
        new_engine: NewEngine = partial(
            OverlappedEngine if plan.overlap else Engine,
            scheduler,
            kv,
            checked,
            clock=clock,
            max_num_waiting=plan.max_num_waiting,
            responsible=responsible,
            seq_ids=itertools.count(),  # of engines that measure, and of the one that serves
        )
        engine = new_engine(_speculation(context, new_engine, clock, model.vocab_size))
        attestation.begin_serving()
        return engine
    except BaseException as e:
        worker.close()
        if isinstance(e, DovetailError) or not isinstance(e, Exception):
            raise
        raise PluginError(f"{responsible(e, ENGINE)}: {type(e).__name__}: {e}") from e


def _speculation(
    context: PlanContext, new_engine: NewEngine, clock: Clock, vocab_size: int
) -> Speculation | None:
    drafter: Drafter | None = context.build("speculation")
    if drafter is None:
        return None
    option, num_draft_tokens = context.option, context.option("speculation", "num_draft_tokens")
    in_worker = context.plan.draft is not None
    drafter = CheckedDrafter(drafter, vocab_size, runs_in_worker=in_worker)
    policy = EverySequence()
    if option("speculation", "adaptive"):
        costs = measure(
            new_engine,
            num_draft_tokens,
            clock,
            max_num_seqs=option("scheduler", "max_num_seqs"),
            max_len=context.plan.max_model_len,
            max_num_batched_tokens=option("scheduler", "max_num_batched_tokens"),
            drafter=drafter if in_worker else None,
        )
        policy = Adaptive(costs, num_draft_tokens, clock)
    return Speculation(drafter, num_draft_tokens, policy, clock)


def weights_of(
    plan: Plan, registry: Registry | None = None, running: Worker | None = None
) -> list[LayerWeights]:
    """Return how the engine of a plan stores the weights of its linear layers. Empty if none is
    quantized, or if the worker does not describe them.

    `running` is the plan's worker; by default one is built, and loads no weights. Raises
    `CheckpointError` or `ConfigError` if the checkpoint and the rules for its layers do not match.
    """
    registry = load_registry() if registry is None else registry
    context = PlanContext(plan, registry, device_facts(), model_facts(Path(plan.folder)))
    can, schemes = (
        context.capabilities("worker"),
        [context.capabilities(key) for key in plan.quantization_rules],
    )
    describes = isinstance(can, WorkerCapabilities) and can.describes_weights
    if not describes or not any(
        isinstance(s, QuantizationCapabilities) and PLAIN not in s.methods for s in schemes
    ):
        return []
    worker: DescribingWorker = (
        context.build("worker") if running is None else cast(DescribingWorker, running)
    )
    try:
        return worker.weights()
    finally:
        if running is None:
            worker.close()


def shadow_report_of(worker: Any) -> ShadowReport | None:
    """Return the shadow report of a worker, or None if it runs no candidates."""
    ask: Callable[[], ShadowReport | None] = getattr(worker, "shadow_report", lambda: None)
    return ask()


def build_server(config: EngineConfig, plan: Plan, registry: Registry | None = None) -> Server:
    """Build the server of a plan, in the front-end. Its options come from `config`, because a plan
    contains no secrets."""
    registry = load_registry() if registry is None else registry
    context = PlanContext(plan, registry, device_facts(), model_facts(Path(plan.folder)))
    added = {s.name for s in registry.extension_points.values() if s.within == "server"}
    options = {k: v for k, v in config.server.options.items() if k not in added}
    server: Server = context.build("server", options)
    return server
