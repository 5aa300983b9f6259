"""Define the extension points of an engine in the order of their selection: name, hook, contract
version, and the checks that apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dovetail.interfaces import (
    architecture,
    attention,
    drafter,
    kv_cache,
    matmul,
    prefix_cache,
    quantization,
    scheduler,
    server,
    worker,
)
from dovetail.plan import Reason
from dovetail.plugin.adapters import attention_from_0_1, kv_cache_from_0_1, prefix_cache_from_0_1
from dovetail.plugin.contracts import Previous, WrittenFor
from dovetail.plugin.provider import (
    Context,
    DrafterOptions,
    KVCacheOptions,
    Options,
    Provider,
    SchedulerOptions,
)


@dataclass(frozen=True)
class ExtensionPoint:
    """A component of an engine that a provider supplies."""

    name: str
    """Key in an engine config."""
    hook: str
    summary: str
    contract: str = "0.1"
    previous: Previous | None = None
    """The previous contract version, which is served through an adapter."""
    options: type[Options] = Options
    """Base class of every provider's options, because other components read them."""
    unsupported: Callable[[Provider[object], Context], list[Reason]] = lambda provider, context: []
    """Returns requirements of the engine config that the provider's capabilities do not declare."""
    invoked: tuple[str, ...] = ()
    """Methods whose first call marks the provider as invoked."""
    invoked_once: bool = False
    """True if these methods are called while the engine is built, and not in every step."""
    optional: bool = False
    """True if it may stay empty: with `none`, or with `auto` if no usable provider is
    installed."""
    many: bool = False
    """True if it has any number of providers. `auto` then selects all that are usable."""
    within: str = ""
    """For an extension point that a plugin adds: the extension point of the plugin's own providers.
    It exists if one of them is selected."""
    contract_class: str = ""
    """`module:Class` of the contract in the conformance kit, unless it is one of the core's own
    (dovetail_testing/contracts.py)."""
    scaffold: str = ""
    """`package:folder` of the template for `dovetail new-plugin`, unless it is one of the core's
    own (dovetail_testing/scaffold)."""
    interface: type | None = None
    """The protocol of the objects that its providers build."""

    def served(self, written: WrittenFor | None) -> str | Reason:
        """Return the contract version at which a plugin is served, or the reason why it is not.
        None stands for the current version."""
        if written is None or written.includes(self.contract):
            return self.contract
        if self.previous and written.includes(self.previous.version):
            return self.previous.version
        also = f" and {self.previous.version}" if self.previous else ""
        text = (
            f"written for contract {written} of {self.name}; this core serves {self.contract}{also}"
        )
        newer = (
            "newer dovetail-core"
            if written.is_newer(self.contract)
            else "newer release of the plugin"
        )
        return Reason(text, f"install a {newer}", "contract")

    def deprecation(self, version: str) -> str | None:
        """Return the notice for a plugin that is served at the previous version, or None."""
        if self.previous is None or version != self.previous.version:
            return None
        since = f"deprecated since {self.contract} ({self.previous.changed})"
        until = f"served through an adapter until {self.previous.until}"
        return f"written for contract {version} of {self.name}, {since}: {until}"

    def adapted(self, version: str, built: Any) -> Any:
        """Return what a provider of this contract version has built as an object of the current
        version."""
        return (
            self.previous.adapt(built)
            if self.previous is not None and version == self.previous.version
            else built
        )

    def missing(self, built: object) -> list[str]:
        """Return the members of the interface that an object lacks. None is accepted: some
        providers build nothing."""
        if self.interface is None or built is None:
            return []
        members = {**vars(self.interface), **getattr(self.interface, "__annotations__", {})}
        public = [name for name in members if name == "__call__" or not name.startswith("_")]
        return [name for name in public if not hasattr(built, name)]


def _unsupported_by_attention(provider: Provider[object], context: Context) -> list[Reason]:
    can, needs = provider.capabilities, context.needs
    if not isinstance(can, attention.AttentionCapabilities):
        return [Reason("does not declare AttentionCapabilities")]
    kind, block_size = context.device_name.split(":")[0], needs.get("block_size")
    if block_size == "auto":
        block_size = attention.open_block_size(can, needs["max_model_len"])
    listed = (
        ("device", kind, can.devices),
        ("dtype", context.dtype, can.dtypes),
        ("KV dtype", needs.get("kv_dtype", context.dtype), can.kv_dtypes),
        ("head size", needs.get("head_size"), can.head_sizes),
        ("block size", block_size, can.block_sizes),
    )
    reasons = [
        Reason(f"{what} {value} is not supported", f"supports {', '.join(map(str, has))}")
        for what, value, has in listed
        if value is not None and has is not None and value not in has
    ]
    features = ("sliding_window", "logit_soft_cap", "sinks", "batch_invariant")
    missing = [f for f in features if needs.get(f) and not getattr(can, f)]
    return reasons + [Reason(f"no support for {f.replace('_', ' ')}") for f in missing]


def _unsupported_by_architecture(provider: Provider[object], context: Context) -> list[Reason]:
    can, reasons = provider.capabilities, []
    if not isinstance(can, architecture.ArchitectureCapabilities):
        return [Reason("does not declare ArchitectureCapabilities")]
    name = context.model.architecture if context.model else ""
    if can.architectures is not None and name not in can.architectures:
        reasons.append(Reason(f"no support for {name or 'a model without a named architecture'}"))
    if context.needs.get("quantized") and not can.quantization:
        reasons.append(
            Reason(
                f"its linear layers cannot be quantized ({', '.join(context.needs['quantized'])})"
            )
        )
    return reasons


def _unsupported_by_quantization(provider: Provider[object], context: Context) -> list[Reason]:
    can, needs = provider.capabilities, context.needs
    if not isinstance(can, quantization.QuantizationCapabilities):
        return [Reason("does not declare QuantizationCapabilities")]
    method = context.model.quantization_method if context.model else quantization.PLAIN
    kind = context.device_name.split(":")[0]
    listed = (("device", kind, can.devices), ("dtype", context.dtype, can.dtypes))
    reasons = [
        Reason(f"{what} {value} is not supported", f"supports {', '.join(has)}")
        for what, value, has in listed
        if has is not None and value not in has
    ]
    # Whatever the method of the checkpoint, some of its layers may be plain. A rule for those can
    # name a scheme that accepts plain weights.
    accepts_plain = can.on_the_fly or quantization.PLAIN in can.methods
    if method in can.methods or (
        accepts_plain and needs.get("by_name") and needs.get("some_layers")
    ):
        return reasons
    reads = f"reads {', '.join(can.methods)}" if can.methods else "quantizes plain weights"
    if method != quantization.PLAIN:
        return [*reasons, Reason(f"the checkpoint is quantized with {method}", reads)]
    if not can.on_the_fly:
        return [*reasons, Reason("the checkpoint is not quantized", reads)]
    if not needs.get("by_name"):
        return [
            *reasons,
            Reason(
                "the checkpoint is not quantized",
                "request it by name to quantize the weights while they are loaded",
            ),
        ]
    return reasons


def _unsupported_by_matmul(provider: Provider[object], context: Context) -> list[Reason]:
    can, needs = provider.capabilities, context.needs
    if not isinstance(can, matmul.MatmulCapabilities):
        return [Reason("does not declare MatmulCapabilities")]
    listed = (
        ("device", context.device_name.split(":")[0], can.devices),
        ("dtype", context.dtype, can.dtypes),
    )
    reasons = [
        Reason(f"{what} {value} is not supported", f"supports {', '.join(has)}")
        for what, value, has in listed
        if has is not None and value not in has
    ]
    lacking = [("weights", c) for c in needs.get("codes", ()) if c not in can.codes]
    lacking += [("inputs", i) for i in needs.get("inputs", ()) if i not in can.inputs]
    return reasons + [Reason(f"{which} {what} are not supported") for what, which in lacking]


def _unsupported_by_worker(provider: Provider[object], context: Context) -> list[Reason]:
    can = provider.capabilities
    if not isinstance(can, worker.WorkerCapabilities):
        can = worker.WorkerCapabilities()
    reasons = []
    if context.needs.get("shadow") and not can.shadow:
        reasons.append(Reason("does not run shadow candidates", "remove shadow"))
    if context.needs.get("drafts") and not can.drafts:
        reasons.append(
            Reason(
                "does not run a draft model",
                "set speculation to a drafter that runs in the engine",
            )
        )
    if context.needs.get("host_tier") and not can.host_tier:
        reasons.append(
            Reason("does not store KV blocks in host memory", "remove prefix_cache.host_memory_gb")
        )
    return reasons


EXTENSION_POINTS: tuple[ExtensionPoint, ...] = (
    ExtensionPoint("model", "dovetail_models", "models provided by plugins, by name"),
    ExtensionPoint(
        "quantization",
        "dovetail_quantization",
        "how the weights of linear layers are stored and multiplied",
        quantization.CONTRACT,
        unsupported=_unsupported_by_quantization,
        interface=quantization.Scheme,
        invoked=("linear",),
        invoked_once=True,
    ),
    ExtensionPoint(
        "matmul",
        "dovetail_matmuls",
        "GEMM with quantized weights",
        matmul.CONTRACT,
        unsupported=_unsupported_by_matmul,
        interface=matmul.Matmul,
        invoked=("linear",),
        invoked_once=True,
    ),
    ExtensionPoint(
        "architecture",
        "dovetail_architectures",
        "model code",
        architecture.CONTRACT,
        unsupported=_unsupported_by_architecture,
        interface=architecture.Architecture,
        invoked=("model",),
        invoked_once=True,
    ),
    ExtensionPoint(
        "worker",
        "dovetail_workers",
        "loads the weights and runs the steps",
        unsupported=_unsupported_by_worker,
        interface=worker.Worker,
        invoked=("submit",),
    ),
    ExtensionPoint(
        "attention",
        "dovetail_attention",
        "paged attention",
        attention.CONTRACT,
        Previous("0.1", "`export_kv` has an argument `out`", "0.3", attention_from_0_1),
        unsupported=_unsupported_by_attention,
        interface=attention.AttentionBackend,
        invoked=("plan",),
    ),
    ExtensionPoint(
        "kv_cache",
        "dovetail_kv_caches",
        "owns the KV blocks",
        kv_cache.CONTRACT,
        Previous(
            "0.1",
            "`reuse` has an argument `may_wait`; `num_cached` and `block_ops` are new",
            "0.3",
            kv_cache_from_0_1,
        ),
        options=KVCacheOptions,
        interface=kv_cache.KVCacheManager,
        invoked=("grow",),
    ),
    ExtensionPoint(
        "scheduler",
        "dovetail_schedulers",
        "selects the tokens of each step",
        options=SchedulerOptions,
        interface=scheduler.Scheduler,
        invoked=("schedule",),
    ),
    ExtensionPoint(
        "prefix_cache",
        "dovetail_prefix_caches",
        "reuses KV between requests",
        prefix_cache.CONTRACT,
        Previous(
            "0.1",
            "it is told which blocks are being computed: `expect`",
            "0.3",
            prefix_cache_from_0_1,
        ),
        optional=True,
        interface=prefix_cache.PrefixCache,
        invoked=("match",),
    ),
    ExtensionPoint(
        "speculation",
        "dovetail_drafters",
        "proposes draft tokens, which the model verifies",
        drafter.CONTRACT,
        options=DrafterOptions,
        optional=True,
        interface=drafter.Drafter,
        invoked=("propose",),
    ),
    ExtensionPoint(
        "server",
        "dovetail_servers",
        "accepts requests from clients",
        interface=server.Server,
        invoked=("run",),
        invoked_once=True,
    ),
)
