"""Read AWQ checkpoints (activation-aware weight quantization, Lin et al., arXiv 2306.00978) in the
packing of AWQ's "gemm" kernel.

`qweight i32[in, out / 8]` and `qzeros i32[in / group, out / 8]` have eight columns per word;
`scales [in / group, out]`. weight = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.interfaces.matmul import Matmul, MatmulScheme, WeightFormat
from dovetail.interfaces.packing import canonical_codes, canonical_zeros, unpack
from dovetail.interfaces.quantization import IN, OUT, Axis, Declined, LinearLayer, Parameter
from dovetail_quant_awq_gptq.settings import Config, group_size, one_of

BITS, PER_WORD = 4, 8
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of the i-th 4-bit code of a word, as ordered by the "gemm" kernel."""


class Awq(MatmulScheme):
    """The scheme for the layers of an AWQ checkpoint. `where` is the path of the config, for error
    messages."""

    def __init__(self, matmul: Matmul, config: Config, where: str) -> None:
        super().__init__(matmul)
        one_of(where, config, ("bits", "w_bit"), (4,), BITS)
        one_of(where, config, ("version", "checkpoint_format"), ("gemm",), "gemm")
        one_of(where, config, ("pack_dtype",), ("int32",), "int32")
        self._group = group_size(where, config, ("group_size", "q_group_size"))
        self._has_zeros: bool = config.get("zero_point", True)
        self._not_quantized: list[str] = config.get("modules_to_not_convert") or []

    def parameters(self, layer: LinearLayer) -> dict[str, Parameter] | Declined:
        if layer.alike(
            self._is_not_quantized, "modules_to_not_convert of the checkpoint's quantization_config"
        ):
            return Declined("not quantized in the checkpoint (modules_to_not_convert)")
        group = self._group or layer.in_features
        odd = [part.name for part in layer.parts if part.out_features % PER_WORD]
        if odd or layer.in_features % group:
            reason = (
                f"the outputs of {odd[0]} are not a multiple of {PER_WORD}"
                if odd
                else f"its inputs are not a multiple of the group size {group}"
            )
            raise CheckpointError(
                f"{layer.name} ({layer.in_features} inputs) cannot be read as AWQ: {reason}"
            )
        words = Axis("out", features=PER_WORD)
        groups = Axis("in", features=group)
        found = {
            "qweight": Parameter((IN, words), "int32"),
            "scales": Parameter((groups, OUT), "float32", scale="not zero"),
        }
        return found | ({"qzeros": Parameter((groups, words), "int32")} if self._has_zeros else {})

    def format(self, layer: LinearLayer) -> WeightFormat:
        return WeightFormat("uint4", self._group, zeros=self._has_zeros)

    def canonical(self, layer: LinearLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        codes = unpack(tensors["qweight"], BITS, 1, INTERLEAVED).T
        found = {"scales": tensors["scales"].T, "codes": canonical_codes(codes, BITS)}
        if self._has_zeros:
            found["zeros"] = canonical_zeros(
                unpack(tensors["qzeros"], BITS, 1, INTERLEAVED).T, BITS
            )
        return found

    def _is_not_quantized(self, name: str) -> bool:
        return name == "lm_head" or any(part in name for part in self._not_quantized)
