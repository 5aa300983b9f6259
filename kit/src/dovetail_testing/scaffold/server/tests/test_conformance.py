"""All the test that a server's life needs: the contract. What it answers is its own, and wants
tests of its own."""

from dovetail_testing.server import ServerContract
from my_plugin import PROVIDER


class TestMyPlugin(ServerContract):
    provider = PROVIDER
