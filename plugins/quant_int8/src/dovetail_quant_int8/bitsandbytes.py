"""Implement LLM.int8() (Dettmers et al., arXiv 2208.07339) in the layout of bitsandbytes: `weight
i8[out, in]` and `SCB f32[out]`, the largest absolute value of each output's weights; weight = code
* SCB / 127.

LLM.int8() rounds inputs to INT8 with one scale per row, except outliers, which it multiplies in 16
bits. `OutlierLinear` says how that is done here.
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
from dovetail_quant_int8.int8 import LARGEST, quantize_rows

WEIGHT_FORMAT = "weight_format"


class BitsAndBytes(MatmulScheme):
    """The scheme for the layers of a bitsandbytes checkpoint with the given config, or of an
    unquantized checkpoint."""

    unused = (f"*.{WEIGHT_FORMAT}",)

    def __init__(self, matmul: Matmul, config: Mapping[str, Any], threshold: float) -> None:
        super().__init__(matmul)
        self._threshold = threshold
        self._not_quantized: list[str] = config.get("llm_int8_skip_modules") or []

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        if layer.stored and layer.alike(
            self._is_not_quantized, "llm_int8_skip_modules of the checkpoint's quantization_config"
        ):
            return Declined("not quantized in the checkpoint (llm_int8_skip_modules)")
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
        codes, largest = quantize_rows(weight.float())
        return {"weight": codes, "SCB": largest}

    def _is_not_quantized(self, name: str) -> bool:
        # The output projection is never quantized, although it is not listed.
        return name == "lm_head" or any(
            f".{listed}." in f".{name}." for listed in self._not_quantized
        )


class OutlierLinear:
    """An INT8 linear layer that splits a row with outliers into two rows: one has only the
    outliers, rounded with their own scale; the other has the remaining inputs and, in place of the
    outliers, their rounding errors.

    Outliers therefore have the same absolute precision as the other inputs, and no second copy of
    the weight is needed. Outliers are detected per row, so a row's output does not depend on other
    rows; bitsandbytes treats an input channel as an outlier if it is one in any row of the batch.
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
        codes, largest = quantize_rows(large.float())
        rest = x.clone()
        rest[rows] = torch.where(
            is_outlier[rows], large - codes * (largest / LARGEST)[:, None], x[rows]
        ).to(x.dtype)
        outputs = self._multiply(torch.cat([rest, large])).float()
        y = outputs[: len(x)]
        y[rows] += outputs[len(x) :]
        return (y if self._bias is None else y + self._bias).to(x.dtype)


def check_row_major(folder: Path) -> None:
    """Raise `CheckpointError` if weights are stored in a GPU's tile layout, which old versions of
    bitsandbytes could write."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                if name.endswith(f".{WEIGHT_FORMAT}") and int(file.get_tensor(name)) != 0:
                    raise CheckpointError(
                        f"{path}: according to {name}, the weight is stored in a GPU's tile layout,"
                        " which is not supported: save it again with a current version of"
                        " bitsandbytes"
                    )
