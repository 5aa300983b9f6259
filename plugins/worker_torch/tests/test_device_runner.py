"""Steps on a device that runs behind the host, played on the CPU: the contracts hold, and nothing is waited for that need not be."""

from __future__ import annotations

from dataclasses import replace

from fake_device import CAPTURABLE, FakeDeviceWorker

from dovetail.testing.attention import AttentionContract
from dovetail.testing.worker import WorkerContract
from dovetail_worker_torch import dovetail_workers

(WORKER,) = dovetail_workers()


class TestAttention(AttentionContract):
    """What the fake device's steps are made of: if it kept no contract, these tests would show nothing."""

    provider = CAPTURABLE


class TestWorker(WorkerContract):
    provider = replace(WORKER, build=FakeDeviceWorker)
    options = {"execution": "plain"}  # noqa: RUF012
