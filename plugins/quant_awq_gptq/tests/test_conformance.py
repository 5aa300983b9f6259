"""Test both formats against the contract. The checkpoints are written as the formats are documented
(awq_gptq_packers.py)."""

from awq_gptq_packers import Config, make_awq, make_gptq
from torch import Tensor

from dovetail.interfaces.quantization import LinearLayer
from dovetail_quant_awq_gptq import AWQ, GPTQ
from dovetail_testing.quantization import QuantizationContract


def pack_awq(config: Config, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
    return make_awq(config, weight)[0]


def pack_gptq(config: Config, layer: LinearLayer, weight: Tensor) -> dict[str, Tensor]:
    return make_gptq(config, weight)[0]


class TestAwq(QuantizationContract):
    provider = AWQ
    pack = pack_awq
    # With one scale for 1024 inputs in 4 bits, half a step is about 14 % of a typical weight.
    weight_error = 0.2
    declined = ("lm_head",)


class TestGptq(QuantizationContract):
    provider = GPTQ
    pack = pack_gptq
    weight_error = 0.2
    declined = ("lm_head",)
