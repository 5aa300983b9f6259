"""Test every format against the contract. The checkpoints are written as the format is documented
(ct_packers.py)."""

from ct_packers import Config, make
from torch import Tensor

from dovetail.interfaces.quantization import LinearLayer
from dovetail_quant_compressed_tensors import PROVIDER
from dovetail_testing.quantization import QuantizationContract


def pack(config: Config, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
    return make(config, weight)[0]


class TestCompressedTensors(QuantizationContract):
    provider = PROVIDER
    pack = pack
    # With one scale for 1024 inputs in 4 bits, half a step is about 14 % of a typical weight.
    weight_error = 0.2
    declined = ("lm_head",)
