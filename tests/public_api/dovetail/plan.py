from __future__ import annotations
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
import msgspec
SHADOW_PREFIX = 'shadow.'

@dataclass(frozen=True)
class Reason:
    text: str
    hint: str = ''
    code: str = 'unusable'
REASONS = {'unusable': 'its own `why_not` says so', 'unsupported': 'the composition needs what it does not declare', 'contract': 'it was written for a version of the contract that this core does not serve', 'requires': "it needs another choice in another extension point, or another extension point's choice needs another one here", 'conflicts': 'it does not go with what another extension point takes', 'priority': 'another usable one has a higher priority', 'not-asked': 'the configuration names another one, or none', 'faulty': 'its `why_not` failed', 'device': 'the device chosen is too old for it, or its driver is'}

class Rejected(msgspec.Struct, frozen=True):
    provider: str
    distribution: str
    reasons: list[Reason]

class Choice(msgspec.Struct, frozen=True, kw_only=True):
    extension_point: str
    requested: str
    provider: str
    distribution: str
    version: str
    contract: str
    options: dict[str, Any]
    match: str = ''
    remarks: list[str] = []
    rejected: list[Rejected] = []

    @property
    def qualified_name(self) -> str:
        ...

    @property
    def is_empty(self) -> bool:
        ...

class DraftModel(msgspec.Struct, frozen=True):
    model: str
    folder: str
    architecture: str

class Plan(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    served_model_name: str
    folder: str
    device: str
    dtype: str
    max_model_len: int
    layer_kinds: list[str]
    choices: dict[str, Choice]
    overlap: bool
    max_num_waiting: int
    trust_remote_code: bool
    architecture: str
    shadow_share: float = 0.0
    draft: DraftModel | None = None
    revision: str | None = None

    @property
    def fingerprint(self) -> str:
        ...

    @property
    def quantization_rules(self) -> dict[str, Choice]:
        ...

    def report(self, invoked: Mapping[str, bool]) -> dict[str, Any]:
        ...

    def encode(self) -> bytes:
        ...

    @staticmethod
    def decode(data: bytes) -> Plan:
        ...
