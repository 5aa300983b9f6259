"""The server keeps the contract of servers."""

from dovetail.testing.server import ServerContract
from dovetail_server_openai import dovetail_servers

(PROVIDER,) = dovetail_servers()


class TestOpenAIServer(ServerContract):
    provider = PROVIDER
