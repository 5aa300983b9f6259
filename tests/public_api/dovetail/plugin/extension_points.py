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
class ExtensionPoint:
    name: str
    hook: str
    summary: str
    contract: str = '0.1'
    previous: Previous | None = None
    options: type[Options] = Options
    unsupported: Callable[[Provider[object], Context], list[Reason]] = lambda provider, context: []
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
EXTENSION_POINTS: tuple[ExtensionPoint, ...] = (ExtensionPoint('model', 'dovetail_models', 'models provided by plugins, by name'), ExtensionPoint('quantization', 'dovetail_quantization', 'how the weights of linear layers are stored and multiplied', quantization.CONTRACT, unsupported=_unsupported_by_quantization, interface=quantization.Scheme, invoked=('linear',), invoked_once=True), ExtensionPoint('matmul', 'dovetail_matmuls', 'GEMM with quantized weights', matmul.CONTRACT, unsupported=_unsupported_by_matmul, interface=matmul.Matmul, invoked=('linear',), invoked_once=True), ExtensionPoint('architecture', 'dovetail_architectures', 'model code', architecture.CONTRACT, unsupported=_unsupported_by_architecture, interface=architecture.Architecture, invoked=('model',), invoked_once=True), ExtensionPoint('worker', 'dovetail_workers', 'loads the weights and runs the steps', unsupported=_unsupported_by_worker, interface=worker.Worker, invoked=('submit',)), ExtensionPoint('attention', 'dovetail_attention', 'paged attention', attention.CONTRACT, Previous('0.1', '`export_kv` has an argument `out`', '0.3', attention_from_0_1), unsupported=_unsupported_by_attention, interface=attention.AttentionBackend, invoked=('plan',)), ExtensionPoint('kv_cache', 'dovetail_kv_caches', 'owns the KV blocks', kv_cache.CONTRACT, Previous('0.1', '`reuse` has an argument `may_wait`; `num_cached` and `block_ops` are new', '0.3', kv_cache_from_0_1), options=KVCacheOptions, interface=kv_cache.KVCacheManager, invoked=('grow',)), ExtensionPoint('scheduler', 'dovetail_schedulers', 'selects the tokens of each step', options=SchedulerOptions, interface=scheduler.Scheduler, invoked=('schedule',)), ExtensionPoint('prefix_cache', 'dovetail_prefix_caches', 'reuses KV between requests', prefix_cache.CONTRACT, Previous('0.1', 'it is told which blocks are being computed: `expect`', '0.3', prefix_cache_from_0_1), optional=True, interface=prefix_cache.PrefixCache, invoked=('match',)), ExtensionPoint('speculation', 'dovetail_drafters', 'proposes draft tokens, which the model verifies', drafter.CONTRACT, options=DrafterOptions, optional=True, interface=drafter.Drafter, invoked=('propose',)), ExtensionPoint('server', 'dovetail_servers', 'accepts requests from clients', interface=server.Server, invoked=('run',), invoked_once=True))
