from __future__ import annotations
import msgspec

class ShadowLayer(msgspec.Struct):
    key: str
    layer: str
    num_compared: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    trusted_seconds: float = 0.0
    candidate_seconds: float = 0.0

    @property
    def speed(self) -> float:
        ...

class ShadowReport(msgspec.Struct):
    share: float
    num_steps: int = 0
    num_sampled_steps: int = 0
    layers: list[ShadowLayer] = []
    extra_bytes: int = 0
    failed: dict[str, str] = {}

    def lines(self, names: dict[str, str]) -> list[str]:
        ...
