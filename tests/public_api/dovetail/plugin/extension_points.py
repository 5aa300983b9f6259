from __future__ import annotations
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from dovetail.interfaces import architecture, attention, drafter, kv_cache, matmul, prefix_cache, quantization, scheduler, server, worker
from dovetail.plan import Reason
from dovetail.plugin.adapters import attention_from_0_1, kv_cache_from_0_1, prefix_cache_from_0_1
from dovetail.plugin.contracts import Previous, WrittenFor
from dovetail.plugin.provider import Context, DrafterOptions, KVCacheOptions, Options, Provider, SchedulerOptions

@dataclass(frozen=True)
class Socket:
    name: str
    hook: str
    summary: str
    contract: str = '0.1'
    previous: Previous | None = None
    options: type[Options] = Options
    undeclared: Callable[[Provider[object], Context], list[Reason]] = lambda provider, context: []
    invoked: tuple[str, ...] = ()
    invoked_once: bool = False
    optional: bool = False
    many: bool = False
    within: str = ''
    contract_class: str = ''
    scaffold: str = ''
    interface: type | None = None

    def served(self, written: WrittenFor | None) -> str | Reason:
        ...

    def deprecation(self, version: str) -> str | None:
        ...

    def adapted(self, version: str, built: Any) -> Any:
        ...

    def missing(self, built: object) -> list[str]:
        ...
SOCKETS: tuple[Socket, ...] = (Socket('model', 'dovetail_models', 'models that come with a plugin, by name'), Socket('quantization', 'dovetail_quantization', 'how the weights of linear layers are stored and multiplied', quantization.CONTRACT, undeclared=_undeclared_quantization, interface=quantization.Scheme, invoked=('linear',), invoked_once=True), Socket('matmul', 'dovetail_matmuls', 'multiplies by quantized weights', matmul.CONTRACT, undeclared=_undeclared_matmul, interface=matmul.Matmul, invoked=('linear',), invoked_once=True), Socket('architecture', 'dovetail_architectures', 'model code', architecture.CONTRACT, undeclared=_undeclared_architecture, interface=architecture.Architecture, invoked=('model',), invoked_once=True), Socket('worker', 'dovetail_workers', 'loads the weights and runs the steps', undeclared=_undeclared_worker, interface=worker.Worker, invoked=('submit',)), Socket('attention', 'dovetail_attention', 'paged attention', attention.CONTRACT, Previous('0.1', 'export_kv takes `out`', '0.3', attention_from_0_1), undeclared=_undeclared_attention, interface=attention.AttentionBackend, invoked=('plan',)), Socket('kv_cache', 'dovetail_kv_caches', 'owns the KV blocks', kv_cache.CONTRACT, Previous('0.1', '`reuse` takes `may_wait`; `num_cached`, `block_ops`', '0.3', kv_cache_from_0_1), options=KVCacheOptions, interface=kv_cache.KVCacheManager, invoked=('grow',)), Socket('scheduler', 'dovetail_schedulers', "picks each step's tokens", options=SchedulerOptions, interface=scheduler.Scheduler, invoked=('schedule',)), Socket('prefix_cache', 'dovetail_prefix_caches', 'reuses KV between requests', prefix_cache.CONTRACT, Previous('0.1', 'it knows what is being computed: `expect`', '0.3', prefix_cache_from_0_1), optional=True, interface=prefix_cache.PrefixCache, invoked=('match',)), Socket('speculation', 'dovetail_drafters', 'drafts tokens, which the model then verifies', drafter.CONTRACT, options=DrafterOptions, optional=True, interface=drafter.Drafter, invoked=('propose',)), Socket('server', 'dovetail_servers', 'takes requests from outside', interface=server.Server, invoked=('run',), invoked_once=True))
