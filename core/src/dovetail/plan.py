"""The resolved composition: the one truth that every process builds from and every status page prints."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec


class Rejected(msgspec.Struct, frozen=True):
    """A candidate that was not taken, and why."""

    provider: str
    distribution: str
    reasons: list[str]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Who fills a socket."""

    socket: str
    requested: str
    provider: str
    distribution: str
    version: str
    contract: str
    options: dict[str, Any]
    """With what they left open decided."""
    remarks: list[str] = []
    """What the provider decided, and why."""
    rejected: list[Rejected] = []

    @property
    def is_empty(self) -> bool:
        """The socket takes nothing: it is optional, and `provider` is "none"."""
        return not self.distribution


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine is built from. Made once, by `compose.resolve`."""

    model: str
    """As configured; also the name it is served under, unless `served_model_name` says else."""
    served_model_name: str
    folder: str
    device: str
    dtype: str
    max_model_len: int
    layer_kinds: list[str]
    choices: dict[str, Choice]
    """By socket; attention has one for each layer kind: attention.full, attention.sliding; a socket of many has one for
    each that it takes: routes.NAME."""
    overlap: bool
    max_num_waiting: int
    trust_remote_code: bool
    architecture: str

    @property
    def fingerprint(self) -> str:
        """Of all that decides what is computed: no paths, no process ids, no list of those not taken."""
        data = msgspec.to_builtins(self)
        del data["folder"]
        for choice in data["choices"].values():
            del choice["rejected"], choice["remarks"]
        return hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest()[:16]

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @staticmethod
    def decode(data: bytes) -> Plan:
        return msgspec.json.decode(data, type=Plan)
