"""A server: the hook, and what this package offers. Imported whenever an engine is composed, so
nothing heavy here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.server import MyPluginServer


class MyPluginOptions(Options):
    """What a user may write beside `use: my-plugin`. A secret is a `SecretStr`: plans and logs mask
    it."""

    max_tokens: int = Field(64, ge=1, description="tokens of an answer")
    drain_seconds: float = Field(
        10, ge=0, description="how long requests in flight may go on after SIGTERM"
    )


def build(context: BuildContext, options: MyPluginOptions) -> MyPluginServer:
    """Called once, in the front-end process, where no tensor library is."""
    from my_plugin.server import MyPluginServer

    return MyPluginServer(options)


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "POST a prompt to any path, get its continuation as text",
    build,
    MyPluginOptions,
    priority=-10,  # `auto` takes the highest: `openai` has 50. Below 0: only when asked for
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_servers() -> list[Provider[MyPluginServer]]:
    return [PROVIDER]
