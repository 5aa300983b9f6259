from __future__ import annotations
import re
from collections.abc import Iterable
import msgspec

class LayerWeights(msgspec.Struct, frozen=True):
    name: str
    in_features: int
    out_features: int
    key: str
    scheme: str
    form: str
    gemm_backend: str
    nbytes: int
    remark: str = ''

class AlikeLayers(msgspec.Struct, frozen=True):
    names: str
    count: int
    one: LayerWeights

    @property
    def nbytes(self) -> int:
        ...

def alike(layers: Iterable[LayerWeights]) -> list[AlikeLayers]:
    ...
