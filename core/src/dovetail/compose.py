"""From a configuration to a plan, and from a plan to an engine.

`resolve` runs once, in the front-end, and loads no weight. `build_engine` runs in the process that hosts the engine,
from the plan alone. Between the two a plan may travel; its fingerprint says that both mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dovetail.config import EngineConfig, SocketConfig
from dovetail.engine import Engine, OverlappedEngine
from dovetail.errors import CheckpointError, ConfigError, OutOfMemory, PluginError
from dovetail.facts import DeviceFacts, ModelFacts, device_facts, model_facts
from dovetail.interfaces.attention import open_block_size
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.model import ModelSource
from dovetail.interfaces.server import Server
from dovetail.interfaces.worker import Progress, Worker
from dovetail.kv_cache import blocks_per_sequence, size_groups
from dovetail.plan import Choice, Plan
from dovetail.plugins.discovery import Registry, load_registry
from dovetail.plugins.selection import choose, find
from dovetail.provider import Context
from dovetail.types import KVGroup


@dataclass(frozen=True)
class BuildContext:
    """What a provider's `build` may ask of the composition."""

    plan: Plan
    registry: Registry
    device: DeviceFacts
    model: ModelFacts
    kv: KVCacheManager | None = None
    """For the scheduler."""
    kv_groups: tuple[KVGroup, ...] = ()
    num_blocks: tuple[int, ...] = ()
    """For the KV-cache manager: per group, the null block included."""

    def option(self, key: str, name: str) -> Any:
        """An option of another socket's choice, such as the KV cache's block size for the worker."""
        return self.plan.choices[key].options[name]

    def build(self, key: str, options: Mapping[str, Any] | None = None) -> Any:
        """Build what the plan chose for a socket. An error names the provider; there is no second choice.

        `options`, if given, are used in place of the plan's, in which secrets are masked.
        """
        choice = self.plan.choices[key]
        offer = find(self.registry, choice)
        try:
            given = choice.options if options is None else options
            return offer.provider.build(self, offer.provider.options.model_validate(given))
        except (CheckpointError, ConfigError, OutOfMemory, PluginError):
            raise
        except Exception as e:
            raise PluginError(
                f"{key}: {offer.qualified_name} could not be built: {type(e).__name__}: {e}", provider=offer.qualified_name
            ) from e


def resolve(config: EngineConfig, registry: Registry | None = None, *, server: bool = False) -> Plan:
    """Choose a provider for every socket. Reads the model's config.json, and no weight.

    Raises `ConfigError`, `PluginError` or `CheckpointError`; what was not taken, and why, is in the plan.
    """
    registry = load_registry() if registry is None else registry
    facts = device_facts()
    device = _device(config.device, facts)
    folder, model_choice = _find_model(config, registry, facts, device)
    model = model_facts(folder)
    dtype = model.dtype if config.dtype == "auto" else config.dtype

    def take(socket: str, wanted: SocketConfig, where: str | None = None, **needs: Any) -> Choice:
        return choose(registry, socket, wanted, Context(facts, model, device, dtype, needs), where)

    length = config.max_model_len or model.max_position_embeddings
    if length > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len: {length} is longer than the model's context of {model.max_position_embeddings} tokens"
        )
    choices = {"model": model_choice} if model_choice else {}
    choices["kv_cache"] = take("kv_cache", config.kv_cache)
    choices["scheduler"] = take("scheduler", config.scheduler)
    kv = choices["kv_cache"].options
    for layer in model.layer_kinds:
        choices[f"attention.{layer.kind}"] = take(
            "attention", config.attention.of(layer.kind), f"attention.{layer.kind}",
            layer_kind=layer.kind, head_size=model.head_size, sliding_window=layer.window is not None,
            logit_soft_cap=model.logit_soft_cap is not None, sinks=model.has_sinks,
            block_size=kv["block_size"], max_model_len=length, kv_dtype=dtype if kv["dtype"] == "auto" else kv["dtype"],
        )  # fmt: skip
    attention = {key: find(registry, c).provider.capabilities for key, c in choices.items() if key.startswith("attention.")}
    if kv["block_size"] == "auto":
        kv["block_size"] = _agreed_block_size({key: open_block_size(can, length) for key, can in attention.items()})
    choices["worker"] = take("worker", config.worker, compiled_attention=all(a.compiled_steps for a in attention.values()))
    if server:
        choices["server"] = take("server", config.server)
    return Plan(
        model=config.model,
        served_model_name=config.served_model_name or config.model,
        folder=str(folder),
        device=device,
        dtype=dtype,
        max_model_len=length,
        layer_kinds=[k.kind for k in model.layer_kinds],
        choices=choices,
        overlap=device != "cpu" if config.overlap == "auto" else config.overlap,
        max_num_waiting=config.max_num_waiting,
        trust_remote_code=config.trust_remote_code,
        architecture=model.architecture,
    )


def build_engine(plan: Plan, progress: Progress, registry: Registry | None = None) -> Engine:
    """Build, load and warm up the engine of a plan. Takes seconds to minutes; `progress` is told."""
    registry = load_registry() if registry is None else registry
    facts, model = device_facts(), model_facts(Path(plan.folder))
    context = BuildContext(plan, registry, facts, model)
    worker: Worker = context.build("worker")
    try:
        worker.load(progress)
        groups = worker.kv_groups()
        limits = plan.choices["scheduler"].options
        num_blocks = _size(plan, groups, worker.kv_memory(), limits["max_num_seqs"], limits["max_num_batched_tokens"])
        worker.allocate(num_blocks)
        worker.warm_up(progress)
        context = replace(context, kv_groups=tuple(groups), num_blocks=tuple(num_blocks))
        kv: KVCacheManager = context.build("kv_cache")
        context = replace(context, kv=kv)
        loop: Callable[..., Engine] = OverlappedEngine if plan.overlap else Engine
        return loop(context.build("scheduler"), kv, worker, max_num_waiting=plan.max_num_waiting)
    except BaseException:
        worker.close()
        raise


def build_server(config: EngineConfig, plan: Plan, registry: Registry | None = None) -> Server:
    """Build the server of a plan, in the front-end. Its options come from `config`: a plan holds no secrets."""
    registry = load_registry() if registry is None else registry
    context = BuildContext(plan, registry, device_facts(), model_facts(Path(plan.folder)))
    server: Server = context.build("server", config.server.options)
    return server


def _agreed_block_size(sizes: dict[str, int]) -> int:
    """All layers' blocks are of one size. `sizes`: what each kind's attention asks for."""
    if len(set(sizes.values())) > 1:
        wishes = ", ".join(f"{key} asks for {size}" for key, size in sizes.items())
        raise ConfigError(f"kv_cache.block_size: is left open, and {wishes}: give a number that all of them take")
    return next(iter(sizes.values()))


def _size(plan: Plan, groups: list[KVGroup], memory: int, max_num_seqs: int, chunk: int) -> list[int]:
    num_blocks = size_groups(groups, memory, plan.max_model_len, max_num_seqs, chunk)
    needed = [blocks_per_sequence(g, plan.max_model_len, chunk) for g in groups]
    if all(n - 1 >= need for n, need in zip(num_blocks, needed, strict=True)):
        return num_blocks
    full_bytes = sum(n * g.bytes_per_block for n, g in zip(needed, groups, strict=True))
    fits = plan.max_model_len
    while fits > 1 and sum(blocks_per_sequence(g, fits, chunk) * g.bytes_per_block for g in groups) > memory:
        fits = fits * 3 // 4
    raise OutOfMemory(
        f"the KV cache has {memory / 2**20:.0f} MiB, and one sequence of max_model_len {plan.max_model_len} tokens needs "
        f"{full_bytes / 2**20:.0f} MiB: lower max_model_len to {fits}, or raise kv_cache.memory_fraction or kv_cache.memory_gb"
    )


def _device(wanted: str, facts: DeviceFacts) -> str:
    if wanted == "auto":
        return facts.devices[0]
    name = "cuda:0" if wanted == "cuda" else wanted
    if name not in facts.devices:
        raise ConfigError(f"device: {wanted!r} is not here; this machine has {', '.join(facts.devices)}")
    return name


def _find_model(config: EngineConfig, registry: Registry, facts: DeviceFacts, device: str) -> tuple[Path, Choice | None]:
    """A provider's name, else a local folder, else a hub id."""
    name = config.model
    offers = registry.of("model")
    if any(name in (o.provider.name, o.qualified_name) for o in offers):
        choice = choose(registry, "model", SocketConfig(use=name), Context(facts, None, device, ""))
        offer = find(registry, choice)
        source = offer.provider.build(None, offer.provider.options())  # type: ignore[arg-type]
        if not isinstance(source, ModelSource):
            raise PluginError(f"model: {offer.qualified_name} built {type(source).__name__}, not a ModelSource")
        return source.folder, choice
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name, config.trust_remote_code), None
    names = ", ".join(o.provider.name for o in offers) or "none"
    raise ConfigError(f"model: {name!r} is neither a model that comes with a plugin ({names}), nor a folder, nor a hub id")


def _from_hub(name: str, with_code: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"model: {name!r} is a hub id, and huggingface_hub is not installed") from None
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", *(["*.py"] if with_code else [])]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:
        raise ConfigError(f"model: {name!r} is no folder here, and the hub did not give it: {type(e).__name__}: {e}") from None
