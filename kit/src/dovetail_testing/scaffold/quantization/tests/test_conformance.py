"""Run the conformance test of a scheme: products, fused and sharded layers, memory, and what must
be rejected."""

from dovetail_testing.quantization import QuantizationContract
from my_plugin import PROVIDER


class TestMyPlugin(QuantizationContract):
    provider = PROVIDER
    weight_error = 0.02  # allowed error of weights, relative to the norm of the plain ones
