"""LLM.int8() (Dettmers et al., arXiv 2208.07339), in the layout of bitsandbytes: `weight i8[out,
in]` and `SCB f32[out]`, the largest absolute value of an output's weights; weight = code * SCB /
127.

Inputs are rounded to INT8 row by row, but for the few of unusual size ("outliers"): those take part
in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.interfaces.matmul import Matmul, MatmulScheme, WeightFormat
from dovetail.interfaces.quantization import IN, OUT, Declined, LinearLayer, Parameter
from dovetail_quant_int8.int8 import LARGEST, rounded

WEIGHT_FORMAT = "weight_format"


class BitsAndBytes(MatmulScheme):
    """Layers of a checkpoint (`config` is its own), or quantized on the fly."""

    unused = (f"*.{WEIGHT_FORMAT}",)

    def __init__(self, matmul: Matmul, config: Mapping[str, Any], threshold: float) -> None:
        super().__init__(matmul)
        self._threshold = threshold
        self._left_out: list[str] = config.get("llm_int8_skip_modules") or []

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        if layer.stored and layer.alike(
            self._is_left_out, "llm_int8_skip_modules of the checkpoint's quantization_config"
        ):
            return Declined("the checkpoint leaves it out (llm_int8_skip_modules)")
        return {
            "weight": Parameter((OUT, IN), "int8"),
            "SCB": Parameter((OUT,), "float32", scale="not negative"),
        }

    def format(self, layer: LinearLayer) -> WeightFormat:
        return WeightFormat("int8", inputs="int8")

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"codes": tensors["weight"], "scales": tensors["SCB"][:, None] / LARGEST}

    def linear(
        self, layer: LinearLayer, tensors: Mapping[str, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        if self._threshold == 0:
            return super().linear(layer, tensors)
        return OutlierLinear(
            super().linear(replace(layer, bias=False), tensors),
            tensors.get("bias"),
            self._threshold,
        )

    def quantize(self, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
        codes, largest = rounded(weight.float())
        return {"weight": codes, "SCB": largest}

    def _is_left_out(self, name: str) -> bool:
        # The output projection is never listed, and never quantized.
        return name == "lm_head" or any(f".{listed}." in f".{name}." for listed in self._left_out)


class OutlierLinear:
    """An INT8 product in which a row with outliers is two rows: the outliers alone, rounded in
    steps of their own, and the other inputs with, in the outliers' places, what that rounding left
    over.

    So outliers are as exact, in absolute terms, as what is beside them, and no second form of the
    weight is kept. What is an outlier is asked of each row alone, so that its output does not
    depend on the others; bitsandbytes takes for one every input that is one in any row of the
    batch.
    """

    def __init__(
        self, multiply: Callable[[Tensor], Tensor], bias: Tensor | None, threshold: float
    ) -> None:
        self._multiply, self._bias, self._threshold = multiply, bias, threshold

    def __call__(self, x: Tensor) -> Tensor:
        is_outlier = x.abs() >= self._threshold
        rows = is_outlier.any(1).nonzero()[:, 0]
        if len(rows) == 0:
            y = self._multiply(x)
            return y if self._bias is None else y + self._bias
        large = torch.where(is_outlier[rows], x[rows], 0)
        codes, largest = rounded(large.float())
        rest = x.clone()
        rest[rows] = torch.where(
            is_outlier[rows], large - codes * (largest / LARGEST)[:, None], x[rows]
        ).to(x.dtype)
        products = self._multiply(torch.cat([rest, large])).float()
        y = products[: len(x)]
        y[rows] += products[len(x) :]
        return (y if self._bias is None else y + self._bias).to(x.dtype)


def check_row_major(folder: Path) -> None:
    """Raise `CheckpointError` if weights are stored in the tiles of some GPU, as old versions of
    bitsandbytes could do."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                if name.endswith(f".{WEIGHT_FORMAT}") and int(file.get_tensor(name)) != 0:
                    raise CheckpointError(
                        f"{path}: {name} says that the weight is stored in tiles for a GPU, and"
                        " rows are read: save it again with a present version of bitsandbytes"
                    )
