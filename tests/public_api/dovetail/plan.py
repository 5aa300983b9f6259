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
REASONS = {'unusable': 'its own `why_not` gives a reason', 'unsupported': 'it does not declare a capability that the engine config requires', 'contract': 'it was written for a version of the contract that this core does not serve', 'requires': "it requires another provider in another extension point, or another extension point's provider requires a different one here", 'conflicts': 'it conflicts with the provider of another extension point', 'priority': 'another usable provider has a higher priority', 'not-asked': 'the engine config names another provider, or none', 'faulty': 'its `why_not` raised an exception', 'device': 'the selected device, or its driver, is too old for it'}

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
