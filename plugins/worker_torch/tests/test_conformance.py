"""The worker keeps the contract, compiled and by PyTorch's own operations."""

import pytest

from dovetail.facts import device_facts
from dovetail.plugin.provider import why_not_built
from dovetail_testing.worker import WorkerContract
from dovetail_worker_torch import dovetail_workers
from dovetail_worker_torch.execution import NEEDED_FLAGS

(PROVIDER,) = dovetail_workers()
NO_KERNELS = why_not_built(device_facts(), NEEDED_FLAGS)


class TestTorchWorker(WorkerContract):
    provider = PROVIDER
    options = {"execution": "plain"}  # noqa: RUF012


@pytest.mark.skipif(bool(NO_KERNELS), reason=f"no compiled steps here: {NO_KERNELS}")
class TestTorchWorkerCompiled(WorkerContract):
    provider = PROVIDER
    options = {"execution": "compiled"}  # noqa: RUF012
