"""All the test that a scheme needs: products, fused and sharded layers, memory, and what must be
refused."""

from dovetail_testing.quantization import QuantizationContract
from my_plugin import PROVIDER


class TestMyPlugin(QuantizationContract):
    provider = PROVIDER
    weight_error = 0.02  # how far weights may be from the plain ones, relative to their norm
