"""Both formats keep the contract; their checkpoints are made from the formats' descriptions
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
    # one scale for 1024 inputs in 4 bits: half a step is 14 % of what is normal, sometimes more
    weight_error = 0.2
    declined = ("lm_head",)


class TestGptq(QuantizationContract):
    provider = GPTQ
    pack = pack_gptq
    weight_error = 0.2
    declined = ("lm_head",)
