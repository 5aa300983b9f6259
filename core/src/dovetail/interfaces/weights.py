"""How the weights of a model's linear layers are kept: for each layer its scheme, what multiplies
by it, and its bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec


class LayerWeights(msgspec.Struct, frozen=True):
    """One linear layer, as an engine has it."""

    name: str
    """Full: "model.layers.3.mlp.down_proj". Parts that are multiplied as one have one name."""
    in_features: int
    out_features: int
    key: str
    """Of the plan: the rule that counts for it."""
    scheme: str
    """The provider that makes it; "none": the weight is plain."""
    form: str
    """In words: "uint4 in groups of 128, zeros", or the dtype of a plain weight."""
    gemm_backend: str
    """"matmul: NAME"; "quantization: NAME", if the scheme multiplies by itself; "worker: KIND" of a
    plain layer."""
    nbytes: int
    """Of the weights in memory, the bias aside."""
    remark: str = ""
    """Why the rule's scheme left it as it is."""


class AlikeLayers(msgspec.Struct, frozen=True):
    """Layers that differ in their number alone."""

    names: str
    """ "model.layers.{0..27}.mlp.down_proj" """
    count: int
    one: LayerWeights
    """The first of them."""

    @property
    def nbytes(self) -> int:
        """Of all."""
        return self.count * self.one.nbytes


def alike(layers: Iterable[LayerWeights]) -> list[AlikeLayers]:
    """In the order of their first."""
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
    """[0, 1, 2, 7] → "{0..2,7}", [3] → "3" """
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
