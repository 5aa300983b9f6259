"""The resolved composition: the one truth that every process builds from and every status page
prints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

SHADOW_PREFIX = "shadow."
"""Of the keys of candidates of a shadow run: "shadow.attention.full"."""


@dataclass(frozen=True)
class Reason:
    """Why a provider cannot be used here, in words for a person; `hint` says what would change
    that."""

    text: str
    hint: str = ""
    code: str = "unusable"
    """For machines: one of `REASONS`."""

    def __str__(self) -> str:
        return f"{self.text} ({self.hint})" if self.hint else self.text


REASONS = {
    "unusable": "its own `why_not` says so",
    "unsupported": "the composition needs what it does not declare",
    "contract": "it was written for a version of the contract that this core does not serve",
    "requires": (
        "it needs another choice in another extension point, or another extension point's choice"
        " needs another one here"
    ),
    "conflicts": "it does not go with what another extension point takes",
    "priority": "another usable one has a higher priority",
    "not-asked": "the configuration names another one, or none",
    "faulty": "its `why_not` failed",
    "device": "the device chosen is too old for it, or its driver is",
}
"""Codes of reasons, and what they mean."""


class Rejected(msgspec.Struct, frozen=True):
    """A candidate that was not taken, and why."""

    provider: str
    distribution: str
    reasons: list[Reason]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Who fills an extension point."""

    extension_point: str
    requested: str
    provider: str
    distribution: str
    version: str
    contract: str
    """The version of the extension point's contract at which it is served."""
    options: dict[str, Any]
    """With what they left open decided."""
    match: str = ""
    """Of a rule for some layers: the glob that their names match."""
    remarks: list[str] = []
    """What the provider decided, and why."""
    rejected: list[Rejected] = []

    @property
    def qualified_name(self) -> str:
        """`dist:name` of who was taken."""
        return f"{self.distribution}:{self.provider}"

    @property
    def is_empty(self) -> bool:
        """The extension point takes nothing: it is optional, and `provider` is "none"."""
        return not self.distribution


class DraftModel(msgspec.Struct, frozen=True):
    """The model that the worker drafts with."""

    model: str
    """As configured."""
    folder: str
    architecture: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine is built from. Made once, by `composition.resolution.resolve`."""

    model: str
    """As configured; also the name it is served under, unless `served_model_name` says else."""
    served_model_name: str
    folder: str
    device: str
    dtype: str
    max_model_len: int
    layer_kinds: list[str]
    choices: dict[str, Choice]
    """By extension point. Attention has one for each layer kind: attention.full, attention.sliding;
    quantization for each rule: quantization.0, … (quantization, if there is one), of which the
    first that matches a layer counts; an extension point of many has one for each that it takes:
    routes.NAME. A draft model has its own: model.draft, architecture.draft, attention.draft."""
    overlap: bool
    max_num_waiting: int
    trust_remote_code: bool
    architecture: str
    shadow_share: float = 0.0
    """Of the steps, on which the candidates run: the choices `shadow.attention.full`, … and
    `shadow.quantization`."""
    draft: DraftModel | None = None
    """Where the drafter runs in the worker."""
    revision: str | None = None
    """Commit of the model, where it was downloaded from the hub."""

    @property
    def fingerprint(self) -> str:
        """Of all that decides what is computed: no paths, no process ids, no list of those not
        taken."""
        data = msgspec.to_builtins(self)
        del data["folder"]
        if data["draft"] is not None:
            del data["draft"]["folder"]
        for choice in data["choices"].values():
            del choice["rejected"], choice["remarks"]
        return hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest()[:16]

    @property
    def quantization_rules(self) -> dict[str, Choice]:
        """By key, in their order."""
        return {
            k: c
            for k, c in self.choices.items()
            if c.extension_point == "quantization" and not k.startswith(SHADOW_PREFIX)
        }

    def report(self, invoked: Mapping[str, bool]) -> dict[str, Any]:
        """The plan for people and machines: with its fingerprint, and for each key what was asked
        for, what was taken and whether that was seen at work (null: it cannot be watched)."""
        attested = {
            key: {"requested": c.requested, "effective": c.provider, "invoked": invoked.get(key)}
            for key, c in self.choices.items()
        }
        return {**msgspec.to_builtins(self), "fingerprint": self.fingerprint, "attested": attested}

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @staticmethod
    def decode(data: bytes) -> Plan:
        return msgspec.json.decode(data, type=Plan)
