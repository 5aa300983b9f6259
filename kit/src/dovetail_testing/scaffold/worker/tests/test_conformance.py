"""Run the conformance test of a worker: the tokens of a tiny model in any batch, chunks and order,
and failures."""

from dovetail_testing.worker import WorkerContract
from my_plugin import PROVIDER


class TestMyPlugin(WorkerContract):
    provider = PROVIDER
    # composition = {"attention": "torch-reference"}  # use one class per engine config to test
