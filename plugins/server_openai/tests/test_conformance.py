"""Test the server against the contract of servers."""

from dovetail_server_openai import dovetail_servers
from dovetail_testing.server import ServerContract

(PROVIDER,) = dovetail_servers()


class TestOpenAIServer(ServerContract):
    provider = PROVIDER
