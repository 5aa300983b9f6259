"""All the test that a worker needs: a tiny model's tokens, in any batch, chunks and order; and what
goes wrong."""

from dovetail_testing.worker import WorkerContract
from my_plugin import PROVIDER


class TestMyPlugin(WorkerContract):
    provider = PROVIDER
    # composition = {"attention": "torch-reference"} # a class for each composition that is worth a
    # test
