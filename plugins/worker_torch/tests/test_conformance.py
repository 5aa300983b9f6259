"""The worker keeps the contract, compiled and by PyTorch's own operations."""

from dovetail_testing.worker import WorkerContract
from dovetail_worker_torch import dovetail_workers

(PROVIDER,) = dovetail_workers()


class TestTorchWorker(WorkerContract):
    provider = PROVIDER
    options = {"execution": "plain"}  # noqa: RUF012


class TestTorchWorkerCompiled(WorkerContract):
    provider = PROVIDER
    options = {"execution": "compiled"}  # noqa: RUF012
