"""The plugin's only test: it fulfils the contract, with the capabilities that it declares."""

from dovetail_route_perplexity import PROVIDER
from dovetail_server_openai.testing import RoutesContract


class TestPerplexity(RoutesContract):
    provider = PROVIDER
    requests = (("POST", "/v1/perplexity", {"text": "import os"}),)
