"""Run the conformance test of GEMM: every declared format, any number of rows, quantized inputs,
and memory."""

from dovetail_testing.matmul import MatmulContract
from my_plugin import PROVIDER


class TestMyPlugin(MatmulContract):
    provider = PROVIDER
