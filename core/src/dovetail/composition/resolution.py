"""Resolve an engine config to a plan: select a provider for every extension point, and record why
the others were rejected. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from dovetail.composition.draft_model import check_draft
from dovetail.composition.models import model_and_choice
from dovetail.composition.quantization import choose_schemes
from dovetail.composition.relations import OtherChoices, Unsatisfied
from dovetail.composition.selection import choose, choose_all, find
from dovetail.errors import ConfigError, DovetailError, PluginError
from dovetail.facts import DeviceFacts, ModelFacts, device_facts, model_facts
from dovetail.interfaces.attention import open_block_size
from dovetail.interfaces.drafter import DrafterCapabilities
from dovetail.interfaces.model import ModelSource
from dovetail.interfaces.quantization import PLAIN, QuantizationCapabilities
from dovetail.plan import SHADOW_PREFIX, Choice, DraftModel, Plan, Reason
from dovetail.plugin.config import EngineConfig, ProviderConfig, ShadowConfig
from dovetail.plugin.discovery import Registry, load_registry
from dovetail.plugin.provider import HOST_MEMORY, Context, DraftModelOptions


def resolve(
    config: EngineConfig, registry: Registry | None = None, *, server: bool = False
) -> Plan:
    """Select a provider for every extension point. Reads the model's config.json, but no weights.

    Raises `ConfigError`, `PluginError` or `CheckpointError`. The plan lists the rejected candidates
    and the reasons.
    """
    registry = load_registry() if registry is None else registry
    excluded: dict[str, Reason] = {}
    while True:
        try:
            return _resolve(config, registry, server, excluded)
        except Unsatisfied as e:
            # A provider that `auto` selected may conflict with one that was requested, or leave no
            # usable provider elsewhere. Exclude it and start again.
            conflicting = [name for name in e.conflicting if name not in excluded]
            if not conflicting:
                raise
            excluded[conflicting[-1]] = Reason(
                f"excluded because it conflicts with another provider: {e.message.splitlines()[0]}",
                code="conflicts",
            )


@dataclass
class Resolution:
    """A plan under construction: the providers selected so far, and the facts for the next
    ones."""

    registry: Registry
    device: DeviceFacts
    model: ModelFacts
    device_name: str
    dtype: str
    choices: dict[str, Choice] = field(default_factory=dict)
    other_choices: OtherChoices = field(default_factory=OtherChoices)

    def context(self, needs: dict[str, Any]) -> Context:
        return Context(self.device, self.model, self.device_name, self.dtype, needs)

    def choose(
        self, extension_point: str, wanted: ProviderConfig, where: str, **needs: Any
    ) -> Choice:
        """Return the provider to select, without recording it."""
        return choose(
            self.registry, extension_point, wanted, self.context(needs), where, self.other_choices
        )

    def record(self, key: str, choice: Choice) -> None:
        self.choices[key] = choice
        if not choice.is_empty:
            self.other_choices.selected[key] = find(self.registry, choice)
            if choice.requested == "auto":
                self.other_choices.by_auto.add(self.other_choices.selected[key].qualified_name)

    def select(self, key: str, wanted: ProviderConfig, **needs: Any) -> Choice:
        """Select a provider for an extension point, and for the extension points that the provider
        adds: their settings are among its options."""
        extension_point = key.partition(".")[0]
        added = [s for s in self.registry.extension_points.values() if s.within == extension_point]
        inner = {s.name: wanted.options[s.name] for s in added if s.name in wanted.options}
        options = {k: v for k, v in wanted.options.items() if k not in inner}
        choice = self.choose(
            extension_point, wanted.model_copy(update={"options": options}), key, **needs
        )
        self.record(key, choice)
        for within in added:
            if self.registry.added_by[within.name].distribution == choice.distribution:
                given = [
                    _provider_config(g, within.name)
                    for g in _as_list(inner.pop(within.name, "auto"))
                ]
                if within.many:
                    requested = [] if given == [ProviderConfig()] else given
                    for one in choose_all(
                        self.registry, within.name, requested, self.context({}), self.other_choices
                    ):
                        self.record(f"{within.name}.{one.provider}", one)
                elif len(given) > 1:
                    raise ConfigError(
                        f"{key}.{within.name}: expected one provider, found {len(given)}"
                    )
                else:
                    self.record(
                        within.name, self.choose(within.name, given[0], f"{key}.{within.name}")
                    )
        if inner:
            raise ConfigError(f"{key}: {', '.join(inner)} is not an option of {choice.provider}")
        return choice

    def needs(self, key: str) -> dict[str, dict[str, Any]]:
        """Return what a selected provider needs from other extension points."""
        offer, options = find(self.registry, self.choices[key]), self.choices[key].options
        try:
            return offer.provider.needs(
                self.context({}), offer.provider.options.model_validate(options)
            )
        except DovetailError:
            raise
        except Exception as e:
            name = offer.qualified_name
            raise PluginError(
                f"{key}: {name}: its function `needs` raised {type(e).__name__}: {e}", provider=name
            ) from e

    def capabilities(self, keys: Iterable[str]) -> dict[str, Any]:
        return {key: self.other_choices.selected[key].provider.capabilities for key in keys}


def _resolve(
    config: EngineConfig, registry: Registry, server: bool, excluded: dict[str, Reason]
) -> Plan:
    facts = device_facts()
    device = _device(config.device, facts)
    context = Context(facts, None, device, "")
    source, model_choice = model_and_choice(
        config.model, "model", config.trust_remote_code, registry, context, config.revision
    )
    model = model_facts(source.folder)
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    length = config.max_model_len or model.max_position_embeddings
    if length > model.max_position_embeddings:
        longest = model.max_position_embeddings
        raise ConfigError(
            f"max_model_len: {length} exceeds the model's context of {longest} tokens"
        )

    r = Resolution(
        registry, facts, model, device, dtype, other_choices=OtherChoices(excluded=excluded)
    )
    if model_choice is not None:
        r.record("model", model_choice)
    schemes = choose_schemes(config.quantization, model, registry, r.choose)
    for key, choice in schemes.items():
        r.record(key, choice)
    weights = r.capabilities(schemes)
    quantized = [schemes[key].provider for key, can in weights.items() if PLAIN not in can.methods]
    shadow = config.shadow
    if shadow is not None and shadow.quantization is not None:
        quantized.append(shadow.quantization.use)
    _select_matmul(r, config.matmul, [*schemes, *_select_candidate_scheme(r, shadow)])
    # If no plugin offers model code, the worker needs none (a simulated worker, for example).
    if config.architecture.use != "auto" or registry.of("architecture"):
        r.select("architecture", config.architecture, quantized=quantized)
    kv = r.select("kv_cache", config.kv_cache).options
    r.select("scheduler", config.scheduler)
    r.select(
        "speculation", config.speculation, by_name=config.speculation.use not in ("auto", "none")
    )
    draft = _select_draft(r, source, length, config.trust_remote_code)
    kv_dtype = dtype if kv["dtype"] == "auto" else kv["dtype"]
    needs_of = {
        k.kind: _attention_needs(model, k.kind, k.window is not None, length, kv_dtype)
        for k in model.layer_kinds
    }
    of_draft = (
        {"draft": _attention_needs(draft[1], "draft", draft[1].is_windowed, length, kv_dtype)}
        if draft
        else {}
    )
    for kind, needs in (needs_of | of_draft).items():
        r.select(
            f"attention.{kind}", config.attention.of(kind), **needs, block_size=kv["block_size"]
        )
    attention = r.capabilities(key for key in r.choices if key.startswith("attention."))
    if kv["block_size"] == "auto":
        kv["block_size"] = _common_block_size(
            {key: open_block_size(can, length) for key, can in attention.items()}
        )
    architecture = (
        r.capabilities(["architecture"])["architecture"] if "architecture" in r.choices else None
    )
    r.select(
        "worker",
        config.worker,
        compiled_attention=all(a.compiled_steps for a in attention.values()),
        graph_capture=all(a.graph_capture for a in attention.values()),
        architecture=architecture,
        quantization=list(weights.values()),
        shadow=shadow is not None,
        drafts=draft is not None,
        matmul=r.capabilities(r.choices.keys() & {"matmul"}),
        host_tier=bool(config.prefix_cache.options.get(HOST_MEMORY)),
    )
    r.select("prefix_cache", config.prefix_cache)
    if shadow is not None:
        _select_candidates(
            r,
            shadow,
            {kind: {**needs, "block_size": kv["block_size"]} for kind, needs in needs_of.items()},
        )
    if server:
        r.select("server", config.server)
    return Plan(
        model=config.model,
        served_model_name=config.served_model_name or config.model,
        folder=str(source.folder),
        device=device,
        dtype=dtype,
        max_model_len=length,
        layer_kinds=[k.kind for k in model.layer_kinds],
        choices=r.choices,
        overlap=device != "cpu" if config.overlap == "auto" else config.overlap,
        max_num_waiting=config.max_num_waiting,
        trust_remote_code=config.trust_remote_code,
        revision=source.revision,
        architecture=model.architecture,
        shadow_share=shadow.share if shadow is not None else 0.0,
        draft=draft[0] if draft else None,
    )


def _attention_needs(
    model: ModelFacts, kind: str, is_windowed: bool, length: int, kv_dtype: str
) -> dict[str, Any]:
    return {
        "layer_kind": kind,
        "head_size": model.head_size,
        "sliding_window": is_windowed,
        "logit_soft_cap": model.logit_soft_cap is not None,
        "sinks": model.has_sinks,
        "max_model_len": length,
        "kv_dtype": kv_dtype,
    }


def _select_draft(
    r: Resolution, target: ModelSource, length: int, with_code: bool
) -> tuple[DraftModel, ModelFacts] | None:
    """Select the draft model, if the selected drafter runs in the worker, and the architecture for
    it."""
    if r.choices["speculation"].is_empty:
        return None
    offer = r.other_choices.selected["speculation"]
    can = offer.provider.capabilities
    if not isinstance(can, DrafterCapabilities) or can.runs_in != "worker":
        return None
    if not issubclass(offer.provider.options, DraftModelOptions):
        text = (
            f"speculation: {offer.qualified_name} runs in the worker, but its options are not a"
            " subclass of DraftModelOptions"
        )
        raise PluginError(text, provider=offer.qualified_name)
    name = r.choices["speculation"].options["model"]
    if name == "auto":
        if target.draft is None:
            raise ConfigError(
                "speculation.model: this model has no draft model of its own: name a model with the"
                " same tokenizer"
            )
        name = r.choices["speculation"].options["model"] = target.draft
    source, choice = model_and_choice(
        name, "speculation.model", with_code, r.registry, r.context({})
    )
    facts = model_facts(source.folder)
    check_draft(name, facts, r.model, length)
    if choice is not None:
        r.record("model.draft", choice)
    if "architecture" in r.choices:
        replace(r, model=facts).select("architecture.draft", ProviderConfig(), quantized=[])
    return DraftModel(name, str(source.folder), facts.architecture), facts


def _select_matmul(r: Resolution, wanted: ProviderConfig, schemes: list[str]) -> None:
    """Select a GEMM provider, if one of the schemes needs it. `schemes` are plan keys."""
    needed = []
    for key in schemes:
        can = find(r.registry, r.choices[key]).provider.capabilities
        if isinstance(can, QuantizationCapabilities) and can.codes:
            most = {"codes": can.codes, "inputs": [can.activations] if can.activations else []}
            needed.append(most | r.needs(key).get("matmul", {}))
    if needed:
        needs = {
            name: list(dict.fromkeys(one for need in needed for one in need[name]))
            for name in ("codes", "inputs")
        }
        r.select("matmul", wanted, **needs)


# Shadow candidates are checked against the selected providers, but not against each other, and the
# selected providers are not checked against them.


def _select_candidate_scheme(r: Resolution, shadow: ShadowConfig | None) -> list[str]:
    """Select the shadow candidate for quantization. Returns its plan key in a list, or an empty
    list."""
    if shadow is None or shadow.quantization is None:
        return []
    key = f"{SHADOW_PREFIX}quantization"
    r.choices[key] = r.choose(
        "quantization", shadow.quantization, key, by_name=True, some_layers=False
    )
    return [key]


def _select_candidates(
    r: Resolution, shadow: ShadowConfig, attention_needs: dict[str, dict[str, Any]]
) -> None:
    """Select the shadow candidates for attention."""
    if shadow.attention is not None:
        for kind, needs in attention_needs.items():
            key = f"{SHADOW_PREFIX}attention.{kind}"
            r.choices[key] = r.choose("attention", shadow.attention.of(kind), key, **needs)


def _common_block_size(sizes: dict[str, int]) -> int:
    """Return the block size of all layers. `sizes` has the one that each attention provider
    prefers."""
    if len(set(sizes.values())) > 1:
        wishes = ", ".join(f"{key} prefers {size}" for key, size in sizes.items())
        raise ConfigError(
            f"kv_cache.block_size: auto is ambiguous, because {wishes}: set a number that all of"
            " them support"
        )
    return next(iter(sizes.values()))


def _device(wanted: str, facts: DeviceFacts) -> str:
    if wanted == "auto":
        return facts.devices[0]
    name = "cuda:0" if wanted == "cuda" else wanted
    if name not in facts.devices:
        why = f". {facts.gpu_trouble}" if name.startswith("cuda") and facts.gpu_trouble else ""
        raise ConfigError(
            f"device: {wanted!r} does not exist; this machine has {', '.join(facts.devices)}{why}"
        )
    return name


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _provider_config(given: Any, where: str) -> ProviderConfig:
    try:
        return ProviderConfig.model_validate(given)
    except ValidationError:
        raise ConfigError(
            f"{where}: expected NAME or {{use: NAME, …options}}, found {given!r}"
        ) from None
