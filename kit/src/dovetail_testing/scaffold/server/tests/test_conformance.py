"""Run the conformance test of a server's life cycle. The API of a server needs tests of its own."""

from dovetail_testing.server import ServerContract
from my_plugin import PROVIDER


class TestMyPlugin(ServerContract):
    provider = PROVIDER
