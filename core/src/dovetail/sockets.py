"""The sockets of an engine, in the order they are filled: name, hook, contract version, and what checks apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dovetail.interfaces import attention
from dovetail.provider import Context, KVCacheOptions, Options, Provider, Reason, SchedulerOptions


@dataclass(frozen=True)
class Socket:
    """A place in the engine that takes one provider."""

    name: str
    """The key in a composition file."""
    hook: str
    summary: str
    contract: str = "0.1"
    options: type[Options] = Options
    """What every provider's options extend, because other parts read them."""
    undeclared: Callable[[Provider[object], Context], list[Reason]] = lambda provider, context: []
    """What the composition needs and the provider's capabilities do not declare."""
    contract_class: str = ""
    """`module:Class` of the conformance kit's contract, where that is not one of the core's own (testing/contracts.py)."""


def _undeclared_attention(provider: Provider[object], context: Context) -> list[Reason]:
    can, needs = provider.capabilities, context.needs
    if not isinstance(can, attention.AttentionCapabilities):
        return [Reason("declares no AttentionCapabilities")]
    kind = context.device_name.split(":")[0]
    listed = (
        ("device", kind, can.devices),
        ("dtype", context.dtype, can.dtypes),
        ("KV dtype", needs.get("kv_dtype", context.dtype), can.kv_dtypes),
        ("head size", needs.get("head_size"), can.head_sizes),
        ("block size", needs.get("block_size"), can.block_sizes),
    )
    reasons = [
        Reason(f"{what} {value} is not supported", f"has {', '.join(map(str, has))}")
        for what, value, has in listed
        if value is not None and has is not None and value not in has
    ]
    features = ("sliding_window", "logit_soft_cap", "sinks", "batch_invariant")
    missing = [f for f in features if needs.get(f) and not getattr(can, f)]
    return reasons + [Reason(f"no support for {f.replace('_', ' ')}") for f in missing]


SOCKETS: tuple[Socket, ...] = (
    Socket("model", "dovetail_models", "models that come with a plugin, by name"),
    Socket("worker", "dovetail_workers", "loads the weights and runs the steps"),
    Socket("attention", "dovetail_attention", "paged attention", attention.CONTRACT, undeclared=_undeclared_attention),
    Socket("kv_cache", "dovetail_kv_caches", "owns the KV blocks", options=KVCacheOptions),
    Socket("scheduler", "dovetail_schedulers", "picks each step's tokens", options=SchedulerOptions),
    Socket("server", "dovetail_servers", "takes requests from outside"),
)
BY_NAME = {s.name: s for s in SOCKETS}
