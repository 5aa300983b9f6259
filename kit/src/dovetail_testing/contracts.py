"""List the contract class of each extension point. An extension point that a plugin adds names its
own in `ExtensionPoint.contract_class`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dovetail.plugin.extension_points import ExtensionPoint

if TYPE_CHECKING:
    from dovetail_testing.contract import Contract

CONTRACTS = {
    "quantization": "dovetail_testing.quantization:QuantizationContract",
    "architecture": "dovetail_testing.architecture:ArchitectureContract",
    "attention": "dovetail_testing.attention:AttentionContract",
    "kv_cache": "dovetail_testing.kv_cache:KVCacheContract",
    "matmul": "dovetail_testing.matmul:MatmulContract",
    "model": "dovetail_testing.model:ModelContract",
    "prefix_cache": "dovetail_testing.prefix_cache:PrefixCacheContract",
    "scheduler": "dovetail_testing.scheduler:SchedulerContract",
    "server": "dovetail_testing.server:ServerContract",
    "speculation": "dovetail_testing.drafter:DrafterContract",
    "worker": "dovetail_testing.worker:WorkerContract",
}


def contract_of(extension_point: ExtensionPoint) -> type[Contract] | None:
    """Return the contract class of an extension point, or None if it has none yet."""
    path = extension_point.contract_class or CONTRACTS.get(extension_point.name)
    if not path:
        return None
    module, name = path.split(":")
    contract: type[Contract] = getattr(importlib.import_module(module), name)
    return contract
