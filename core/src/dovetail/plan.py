"""Define the engine plan: the resolved engine config that every process builds from and every
status page prints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

SHADOW_PREFIX = "shadow."
"""Prefix of the keys of shadow-run candidates, as in "shadow.attention.full"."""


@dataclass(frozen=True)
class Reason:
    """Why a provider cannot be used here, in words for a person. `hint` says what would change
    that."""

    text: str
    hint: str = ""
    code: str = "unusable"
    """Machine-readable code: a key of `REASONS`."""

    def __str__(self) -> str:
        return f"{self.text} ({self.hint})" if self.hint else self.text


REASONS = {
    "unusable": "its own `why_not` gives a reason",
    "unsupported": "it does not declare a capability that the engine config requires",
    "contract": "it was written for a version of the contract that this core does not serve",
    "requires": (
        "it requires another provider in another extension point, or another extension point's"
        " provider requires a different one here"
    ),
    "conflicts": "it conflicts with the provider of another extension point",
    "priority": "another usable provider has a higher priority",
    "not-asked": "the engine config names another provider, or none",
    "faulty": "its `why_not` raised an exception",
    "device": "the selected device, or its driver, is too old for it",
}
"""Meaning of each reason code."""


class Rejected(msgspec.Struct, frozen=True):
    """A candidate that was not selected, with the reasons."""

    provider: str
    distribution: str
    reasons: list[Reason]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The provider selected for an extension point."""

    extension_point: str
    requested: str
    provider: str
    distribution: str
    version: str
    contract: str
    """Version of the extension point's contract that is served to this provider."""
    options: dict[str, Any]
    """Resolved options: no value is left at `auto`."""
    match: str = ""
    """Glob that the names of the layers match, for a rule that covers some layers."""
    remarks: list[str] = []
    """Notes of the provider on how it resolved its options."""
    rejected: list[Rejected] = []

    @property
    def qualified_name(self) -> str:
        """`dist:name` of the selected provider."""
        return f"{self.distribution}:{self.provider}"

    @property
    def is_empty(self) -> bool:
        """True if nothing is selected: the extension point is optional, and `provider` is
        "none"."""
        return not self.distribution


class DraftModel(msgspec.Struct, frozen=True):
    """The model that the worker uses to propose draft tokens."""

    model: str
    """Model name as configured."""
    folder: str
    architecture: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine is built from. Built once, by `composition.resolution.resolve`."""

    model: str
    """Model name as configured; requests use it too unless `served_model_name` is set."""
    served_model_name: str
    folder: str
    device: str
    dtype: str
    max_model_len: int
    layer_kinds: list[str]
    choices: dict[str, Choice]
    """Selected providers by plan key. The key is the extension point, with these exceptions:
    attention has one key per layer kind (attention.full, attention.sliding); quantization has one
    per rule (quantization.0, …, or quantization if there is one rule), and the first rule that
    matches a layer applies; an extension point with several providers has one per provider
    (routes.NAME). A draft model has keys of its own: model.draft, architecture.draft,
    attention.draft."""
    overlap: bool
    max_num_waiting: int
    trust_remote_code: bool
    architecture: str
    shadow_share: float = 0.0
    """Share of the steps on which candidates run in a shadow run. The candidates are the choices
    `shadow.attention.full`, … and `shadow.quantization`."""
    draft: DraftModel | None = None
    """Set if the drafter runs in the worker."""
    revision: str | None = None
    """Commit of the model, if it was downloaded from the hub."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides what is computed. Paths, process ids and rejected
        candidates are left out."""
        data = msgspec.to_builtins(self)
        del data["folder"]
        if data["draft"] is not None:
            del data["draft"]["folder"]
        for choice in data["choices"].values():
            del choice["rejected"], choice["remarks"]
        return hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest()[:16]

    @property
    def quantization_rules(self) -> dict[str, Choice]:
        """The choices of quantization rules by plan key, in the order of the rules."""
        return {
            k: c
            for k, c in self.choices.items()
            if c.extension_point == "quantization" and not k.startswith(SHADOW_PREFIX)
        }

    def report(self, invoked: Mapping[str, bool]) -> dict[str, Any]:
        """Return the plan with its fingerprint and, for each key, the requested provider, the
        effective one, and whether it has been invoked (None if it cannot be observed)."""
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
