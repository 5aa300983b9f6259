"""Test the contract of routes: declared requests succeed, no other route is hidden, and invalid
bodies do no harm."""

from dovetail_server_openai.testing import RoutesContract
from my_plugin import PROVIDER


class TestMyPlugin(RoutesContract):
    provider = PROVIDER
    requests = (("POST", "/v1/my-plugin", {"text": "import os"}),)
