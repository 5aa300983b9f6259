"""Convert the tensors of an FP8 layer to the canonical form.

| granularity | weight | its scale | activation scale, if static |
|---|---|---|---|
| block (transformers) | `weight f8_e4m3[out, in]` | `weight_scale_inv [out / 128, in / 128]` | |
| tensor (transformers) | the same | `weight_scale_inv []` | `activation_scale []` |
| tensor (AutoFP8) | the same | `weight_scale []` | `input_scale []` |
| channel (at load time) | the same | `weight_scale [out, 1]` | |

weight = code * scale; in spite of its name, `weight_scale_inv` is not inverted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.interfaces.matmul import Matmul, MatmulScheme, WeightFormat
from dovetail.interfaces.quantization import IN, OUT, Axis, Declined, LinearLayer, Parameter
from dovetail_quant_fp8.options import Fp8Options

LARGEST = 448.0
BLOCK = (128, 128)
"""Block size (outputs, inputs) for weights quantized at load time."""


class Fp8(MatmulScheme):
    """The scheme for the layers of an FP8 checkpoint with the given config, or of an unquantized
    checkpoint if `config` is None. The options are resolved."""

    unused = ("*.activation_scale", "*.input_scale")  # not used unless activations are static

    def __init__(
        self, matmul: Matmul, config: Mapping[str, Any] | None, options: Fp8Options
    ) -> None:
        super().__init__(matmul)
        config = {"weight_block_size": None} if config is None else config
        self._granularity, self._activations = options.granularity, options.activations
        self._block: tuple[int, int] = tuple(config.get("weight_block_size") or BLOCK)
        self._scale_dtype = "float8_e8m0fnu" if config.get("scale_fmt") == "ue8m0" else "float32"
        # transformers always writes weight_block_size, AutoFP8 never does.
        self._scale, self._input_scale = "weight_scale_inv", "activation_scale"
        if "weight_block_size" not in config:
            self._scale, self._input_scale = "weight_scale", "input_scale"
        self._not_quantized: list[str] = [
            *(config.get("modules_to_not_convert") or ()),
            *(config.get("ignored_layers") or ()),
        ]
        self._has_kv_scales = bool(config.get("kv_cache_scheme"))

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        if layer.stored and layer.alike(
            self._is_not_quantized, "modules_to_not_convert of the checkpoint's quantization_config"
        ):
            return Declined("not quantized in the checkpoint (modules_to_not_convert)")
        outputs, inputs = self._block
        axes = {
            "tensor": (),
            "channel": (OUT, 1),
            "block": (Axis("out", features=outputs), Axis("in", features=inputs)),
        }
        found = {
            "weight": Parameter((OUT, IN), "float8_e4m3fn"),
            self._scale: Parameter(
                axes[self._granularity], self._scale_dtype, scale="not negative"
            ),
        }
        if self._activations == "static":
            found[self._input_scale] = Parameter((), "float32", scale="positive")
        return found

    def format(self, layer: LinearLayer) -> WeightFormat:
        return WeightFormat(
            "float8_e4m3fn",
            self._block[1] if self._granularity == "block" else None,
            inputs=None if self._activations == "none" else "float8_e4m3fn",
            input_scale=self._activations == "static",
        )

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {
            "codes": tensors["weight"],
            "scales": self._scales(layer, tensors[self._scale].float()),
        }
        if self._activations == "static":
            # The parts share one input, and the largest scale covers the range of every part.
            found["input_scale"] = tensors[self._input_scale].amax().reshape(1)
        return found

    def quantize(self, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
        outputs, inputs = {
            "tensor": weight.shape,
            "channel": (1, weight.shape[1]),
            "block": self._block,
        }[self._granularity]
        rows, columns = (
            -(-size // unit) for size, unit in zip(weight.shape, (outputs, inputs), strict=True)
        )
        padded = F.pad(
            weight.float(),
            (0, columns * inputs - weight.shape[1], 0, rows * outputs - weight.shape[0]),
        )
        blocks = padded.view(rows, outputs, columns, inputs)
        scales = blocks.abs().amax((1, 3), keepdim=True) / LARGEST
        codes = (
            (blocks / torch.where(scales > 0, scales, 1.0))
            .clamp(-LARGEST, LARGEST)
            .to(torch.float8_e4m3fn)
        )
        codes = codes.view(padded.shape)[: weight.shape[0], : weight.shape[1]].contiguous()
        scales = scales.reshape(() if self._granularity == "tensor" else (rows, columns))
        return {"weight": codes, self._scale: scales}

    def kv_scales(self, name: str) -> dict[str, Parameter] | None:
        """Return the parameters as AutoFP8 stores them: output scales of the key and value
        projections."""
        if not self._has_kv_scales:
            return None
        return {
            f"{name}.{which}_proj.output_scale": Parameter((), "float32", scale="positive")
            for which in ("k", "v")
        }

    def _scales(self, layer: LinearLayer, scale: Tensor) -> Tensor:
        """Return the scales as f32[out, groups]."""
        if self._granularity == "channel":
            return scale
        unit = self._block[0] if self._granularity == "block" else layer.out_features
        # Blocks start anew with each part, and a part's last block may be smaller.
        counts = [-(-part.out_features // unit) for part in layer.parts]
        pieces = zip(layer.parts, torch.split(scale.reshape(sum(counts), -1), counts), strict=True)
        return torch.cat(
            [piece.repeat_interleave(unit, 0)[: part.out_features] for part, piece in pieces]
        )

    def _is_not_quantized(self, name: str) -> bool:
        # The output projection is never quantized, although it is not listed.
        return name == "lm_head" or any(
            f".{listed}." in f".{name}." for listed in self._not_quantized
        )
