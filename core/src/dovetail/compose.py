"""From a configuration to a plan, and from a plan to an engine.

`resolve` runs once, in the front-end, and loads no weight. `build_engine` runs in the process that hosts the engine,
from the plan alone. Between the two a plan may travel; its fingerprint says that both mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dovetail.config import EngineConfig, SocketConfig
from dovetail.contracts import adapted
from dovetail.engine import Engine, OverlappedEngine
from dovetail.errors import CheckpointError, ConfigError, OutOfMemory, PluginError
from dovetail.facts import DeviceFacts, ModelFacts, device_facts, model_facts
from dovetail.interfaces.architecture import ArchitectureCapabilities
from dovetail.interfaces.drafter import Drafter
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.model import ModelSource
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.interfaces.quantization import PLAIN
from dovetail.interfaces.server import Server
from dovetail.interfaces.worker import Progress, Worker
from dovetail.kv_cache import blocks_per_sequence, size_groups
from dovetail.plan import Choice, Plan
from dovetail.plugins.discovery import Registry, load_registry
from dovetail.plugins.quantization import choose_schemes
from dovetail.plugins.relations import Neighbours, Unsatisfied
from dovetail.plugins.selection import choose, choose_all, find
from dovetail.provider import Context, Reason
from dovetail.speculation import Speculation
from dovetail.types import KVGroup


@dataclass(frozen=True)
class BuildContext:
    """What a provider's `build` may ask of the composition."""

    plan: Plan
    registry: Registry
    device: DeviceFacts
    model: ModelFacts
    prefix_cache: PrefixCache | None = None
    """For the KV-cache manager."""
    kv: KVCacheManager | None = None
    """For the scheduler."""
    kv_groups: tuple[KVGroup, ...] = ()
    num_blocks: tuple[int, ...] = ()
    """For the KV-cache manager: per group, the null block included."""

    def option(self, key: str, name: str) -> Any:
        """An option of another socket's choice, such as the KV cache's block size for the worker."""
        return self.plan.choices[key].options[name]

    def capabilities(self, key: str) -> Any:
        """What the provider that the plan chose for a socket declares."""
        return find(self.registry, self.plan.choices[key]).provider.capabilities

    def build(self, key: str, options: Mapping[str, Any] | None = None) -> Any:
        """Build what the plan chose for a socket, None where it is empty. An error names the provider; there is no
        second choice.

        `options`, if given, are used in place of the plan's, in which secrets are masked.
        """
        choice = self.plan.choices[key]
        if choice.is_empty:
            return None
        offer = find(self.registry, choice)
        try:
            given = choice.options if options is None else options
            built = offer.provider.build(self, offer.provider.options.model_validate(given))
            return adapted(self.registry.sockets[choice.socket], choice.contract, built)
        except (CheckpointError, ConfigError, OutOfMemory, PluginError):
            raise
        except Exception as e:
            raise PluginError(
                f"{key}: {offer.qualified_name} could not be built: {type(e).__name__}: {e}", provider=offer.qualified_name
            ) from e


    def build_all(self, socket: str) -> dict[str, Any]:
        """What the plan chose for a socket that takes many, by the providers' names."""
        return {c.provider: self.build(key) for key, c in self.plan.choices.items() if c.socket == socket}


def resolve(config: EngineConfig, registry: Registry | None = None, *, server: bool = False) -> Plan:
    """Choose a provider for every socket. Reads the model's config.json, and no weight.

    Raises `ConfigError`, `PluginError` or `CheckpointError`; what was not taken, and why, is in the plan.
    """
    registry = load_registry() if registry is None else registry
    excluded: dict[str, Reason] = {}
    while True:
        try:
            return _resolve(config, registry, server, excluded)
        except Unsatisfied as e:
            # What `auto` took may stand in the way of what was asked for, or of anything at all: it gives way.
            culprits = [name for name in e.culprits if name not in excluded]
            if not culprits:
                raise
            excluded[culprits[-1]] = Reason(f"left no choice: {e.message.splitlines()[0]}", code="conflicts")


def _resolve(config: EngineConfig, registry: Registry, server: bool, excluded: dict[str, Reason]) -> Plan:
    facts = device_facts()
    device = _device(config.device, facts)
    folder, model_choice = _find_model(config, registry, facts, device)
    model = model_facts(folder)
    dtype = model.dtype if config.dtype == "auto" else config.dtype

    choices = {"model": model_choice} if model_choice else {}
    neighbours = Neighbours(excluded=excluded)

    def take(key: str, wanted: SocketConfig, **needs: Any) -> Choice:
        """Fill a socket, and those that its provider opens to others: their settings are among its options."""
        name, context = key.partition(".")[0], Context(facts, model, device, dtype, needs)
        inner = {k: v for k, v in wanted.options.items() if k in registry.sockets and registry.sockets[k].within == name}
        options = {k: v for k, v in wanted.options.items() if k not in inner}
        wanted = wanted.model_copy(update={"options": options})
        choice = choices[key] = choose(registry, name, wanted, context, key, neighbours)
        if not choice.is_empty:
            neighbours.taken[key] = find(registry, choice)
            if wanted.use == "auto":
                neighbours.by_auto.add(neighbours.taken[key].qualified_name)
        for socket in registry.sockets.values():
            if socket.within == name and registry.added_by[socket.name].distribution == choice.distribution:
                given = inner.pop(socket.name, "auto")
                if socket.many:
                    asked = [] if given == "auto" else [_socket_config(g, socket.name) for g in _as_list(given)]
                    taken = choose_all(registry, socket.name, asked, context)
                    choices.update({f"{socket.name}.{c.provider}": c for c in taken})
                else:
                    choices[socket.name] = choose(registry, socket.name, _socket_config(given, socket.name), context)
        if inner:
            raise ConfigError(f"{key}: {', '.join(inner)} is not an option of {choice.provider}")
        return choice

    def ask(socket: str, wanted: SocketConfig, where: str, **needs: Any) -> Choice:
        return choose(registry, socket, wanted, Context(facts, model, device, dtype, needs), where)

    schemes = choose_schemes(config.quantization, model, registry, ask)
    choices.update(schemes)
    quantized = [c.provider for c in schemes.values() if PLAIN not in find(registry, c).provider.capabilities.methods]
    made: ArchitectureCapabilities | None = None
    # Where nobody offers model code, workers need none: a simulated one, for example.
    if config.architecture.use != "auto" or registry.of("architecture"):
        made = find(registry, take("architecture", config.architecture, quantized=quantized)).provider.capabilities
    take("kv_cache", config.kv_cache)
    take("scheduler", config.scheduler)
    kv = choices["kv_cache"].options
    for layer in model.layer_kinds:
        take(
            f"attention.{layer.kind}", config.attention.of(layer.kind),
            layer_kind=layer.kind, head_size=model.head_size, sliding_window=layer.window is not None,
            logit_soft_cap=model.logit_soft_cap is not None, sinks=model.has_sinks,
            block_size=kv["block_size"], kv_dtype=dtype if kv["dtype"] == "auto" else kv["dtype"],
        )  # fmt: skip
    attention = [find(registry, c).provider.capabilities for key, c in choices.items() if key.startswith("attention.")]
    take(
        "worker", config.worker, compiled_attention=all(a.compiled_steps for a in attention), architecture=made,
        quantization=[find(registry, c).provider.capabilities for c in schemes.values()],
    )  # fmt: skip
    take("prefix_cache", config.prefix_cache)
    take("speculation", config.speculation)
    if server:
        take("server", config.server)
    length = config.max_model_len or model.max_position_embeddings
    if length > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len: {length} is longer than the model's context of {model.max_position_embeddings} tokens"
        )
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
        context = replace(context, prefix_cache=context.build("prefix_cache"))
        kv: KVCacheManager = context.build("kv_cache")
        context = replace(context, kv=kv)
        loop: Callable[..., Engine] = OverlappedEngine if plan.overlap else Engine
        speculation = _speculation(context, model.vocab_size)
        return loop(context.build("scheduler"), kv, worker, speculation, max_num_waiting=plan.max_num_waiting)
    except BaseException:
        worker.close()
        raise


def _speculation(context: BuildContext, vocab_size: int) -> Speculation | None:
    drafter: Drafter | None = context.build("speculation")
    if drafter is None:
        return None
    return Speculation(drafter, context.option("speculation", "num_draft_tokens"), vocab_size)


def build_server(config: EngineConfig, plan: Plan, registry: Registry | None = None) -> Server:
    """Build the server of a plan, in the front-end. Its options come from `config`: a plan holds no secrets."""
    registry = load_registry() if registry is None else registry
    context = BuildContext(plan, registry, device_facts(), model_facts(Path(plan.folder)))
    opened = {s.name for s in registry.sockets.values() if s.within == "server"}
    options = {k: v for k, v in config.server.options.items() if k not in opened}
    server: Server = context.build("server", options)
    return server


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


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _socket_config(given: Any, where: str) -> SocketConfig:
    try:
        return SocketConfig.model_validate(given)
    except ValidationError:
        raise ConfigError(f"{where}: expected NAME or {{use: NAME, …options}}, found {given!r}") from None


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
