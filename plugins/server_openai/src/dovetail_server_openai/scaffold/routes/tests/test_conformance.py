"""All the test that a route needs: it answers what it promises, hides no other route, and hurts
nobody."""

from dovetail_server_openai.testing import RoutesContract
from my_plugin import PROVIDER


class TestMyPlugin(RoutesContract):
    provider = PROVIDER
    requests = (("POST", "/v1/my-plugin", {"text": "import os"}),)
