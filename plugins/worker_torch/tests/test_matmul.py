"""The reference of quantized products keeps the contract too."""

from dovetail_testing.matmul import MatmulContract
from dovetail_worker_torch import dovetail_matmuls

(PROVIDER,) = dovetail_matmuls()


class TestTorchMatmul(MatmulContract):
    provider = PROVIDER
