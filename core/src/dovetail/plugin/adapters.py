"""Adapt objects written for the previous version of a contract to the current one."""

from __future__ import annotations

from typing import Any

from dovetail.errors import PluginError
from dovetail.interfaces.attention import Array, AttentionBackend
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.sequence import Sequence
from dovetail.types import BlockOp


class AttentionFrom01:
    """Adapter for an attention backend of contract 0.1, whose `export_kv` has no argument `out`."""

    def __init__(self, old: Any) -> None:
        self._old = old
        # Called for every layer: bound directly, to avoid one more call.
        self.plan, self.run = old.plan, old.run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._old, name)

    def export_kv(
        self, cache: Any, block_ids: list[int], out: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        keys, values = self._old.export_kv(cache, block_ids)
        if out is None:
            return keys, values
        out[0][...], out[1][...] = keys, values
        return out


def attention_from_0_1(old: Any) -> AttentionBackend:
    backend: AttentionBackend = AttentionFrom01(old)
    return backend


class KVCacheFrom01:
    """Adapter for a KV-cache manager of contract 0.1, whose `reuse` has no argument `may_wait` and
    whose prefix cache cannot be reset."""

    def __init__(self, old: Any) -> None:
        self._old = old
        self.grow, self.computed, self.block_ids = old.grow, old.computed, old.block_ids
        self.block_ops: list[BlockOp] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._old, name)

    def reuse(self, seq: Sequence, num_tokens: int, *, may_wait: bool = False) -> int | None:
        found: int = self._old.reuse(seq, num_tokens)
        return found

    def num_cached(self, seq: Sequence, num_tokens: int) -> int:
        return 0

    def reset_prefix_cache(self) -> None:
        raise PluginError(
            "this KV-cache manager is written for contract 0.1, in which the prefix cache cannot be"
            " reset"
        )


def kv_cache_from_0_1(old: Any) -> KVCacheManager:
    manager: KVCacheManager = KVCacheFrom01(old)
    return manager


class PrefixCacheFrom01:
    """Adapter for a prefix cache of contract 0.1, which does not track blocks being computed."""

    def __init__(self, old: Any) -> None:
        self._old = old

    def __getattr__(self, name: str) -> Any:
        return getattr(self._old, name)

    def expect(self, seq: Sequence, first: int, end: int) -> None: ...

    def expected_from(self, seq: Sequence, block: int) -> int | None:
        return None


def prefix_cache_from_0_1(old: Any) -> PrefixCache:
    cache: PrefixCache = PrefixCacheFrom01(old)
    return cache
