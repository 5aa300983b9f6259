"""The plugin's only test: it fulfils the contract, with the capabilities that it declares."""

from dovetail_quant_nf4 import PROVIDER
from dovetail_testing.quantization import QuantizationContract


class TestNF4(QuantizationContract):
    provider = PROVIDER
    declined = ("model.layers.3.mlp.kit_proj",)
    weight_error = 0.12
