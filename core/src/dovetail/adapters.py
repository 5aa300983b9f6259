"""Objects written for the previous version of a contract, in the shape of the present one."""

from __future__ import annotations

from typing import Any

from dovetail.interfaces.attention import Array, AttentionBackend


class AttentionFrom01:
    """An attention backend of contract 0.1, whose `export_kv` knows no `out`."""

    def __init__(self, old: Any) -> None:
        self._old = old
        # Called for every layer: bound here, so that nothing lies between.
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
