"""Which contract class belongs to a socket. A socket that a plugin adds names its own, in `Socket.contract_class`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dovetail.sockets import Socket

if TYPE_CHECKING:
    from dovetail.testing.contract import Contract

CONTRACTS = {
    "quantization": "dovetail.testing.quantization:QuantizationContract",
    "architecture": "dovetail.testing.architecture:ArchitectureContract",
    "attention": "dovetail.testing.attention:AttentionContract",
    "kv_cache": "dovetail.testing.kv_cache:KVCacheContract",
    "matmul": "dovetail.testing.matmul:MatmulContract",
    "model": "dovetail.testing.model:ModelContract",
    "prefix_cache": "dovetail.testing.prefix_cache:PrefixCacheContract",
    "scheduler": "dovetail.testing.scheduler:SchedulerContract",
    "server": "dovetail.testing.server:ServerContract",
    "speculation": "dovetail.testing.drafter:DrafterContract",
    "worker": "dovetail.testing.worker:WorkerContract",
}


def contract_of(socket: Socket) -> type[Contract] | None:
    """None: the socket has no contract class yet."""
    path = socket.contract_class or CONTRACTS.get(socket.name)
    if not path:
        return None
    module, name = path.split(":")
    contract: type[Contract] = getattr(importlib.import_module(module), name)
    return contract
