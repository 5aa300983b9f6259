"""Describe how the weights of a model's linear layers are stored: the scheme, the GEMM backend and
the bytes of each layer."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec


class LayerWeights(msgspec.Struct, frozen=True):
    """One linear layer of an engine."""

    name: str
    """Full name: "model.layers.3.mlp.down_proj". Fused parts have one name."""
    in_features: int
    out_features: int
    key: str
    """Plan key of the quantization rule that applies to it."""
    scheme: str
    """Provider that builds the layer; "none" for an unquantized weight."""
    form: str
    """Storage format in words ("uint4 in groups of 128, zeros"), or the dtype of an unquantized
    weight."""
    gemm_backend: str
    """Provider of the GEMM: "matmul: NAME"; "quantization: NAME" if the scheme has its own
    GEMM; "worker: KIND" for an unquantized layer."""
    nbytes: int
    """Bytes of the weights in memory, without the bias."""
    remark: str = ""
    """Reason why the rule's scheme left the layer unquantized."""


class AlikeLayers(msgspec.Struct, frozen=True):
    """Layers that differ only in their layer number."""

    names: str
    """Names with ranges of numbers: "model.layers.{0..27}.mlp.down_proj"."""
    count: int
    one: LayerWeights
    """The first of the layers."""

    @property
    def nbytes(self) -> int:
        """Bytes of all layers together."""
        return self.count * self.one.nbytes


def alike(layers: Iterable[LayerWeights]) -> list[AlikeLayers]:
    """Group layers that differ only in their number, in the order of each group's first layer."""
    found: dict[tuple[str, LayerWeights], list[LayerWeights]] = {}
    for layer in layers:
        pattern = re.sub(r"\.\d+\.", ".{}.", layer.name, count=1)
        found.setdefault((pattern, msgspec.structs.replace(layer, name="")), []).append(layer)
    return [
        AlikeLayers(
            pattern.replace("{}", _ranges([_number(layer.name) for layer in same]), 1),
            len(same),
            same[0],
        )
        for (pattern, _), same in found.items()
    ]


def _number(name: str) -> int:
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else 0


def _ranges(numbers: list[int]) -> str:
    """Format numbers as ranges: [0, 1, 2, 7] → "{0..2,7}", [3] → "3" """
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
