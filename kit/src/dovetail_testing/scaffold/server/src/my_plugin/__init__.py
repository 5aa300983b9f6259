"""Register a server. This module is imported whenever an engine is composed, so it must be
light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.server import MyPluginServer


class MyPluginOptions(Options):
    """Options beside `use: my-plugin` in an engine config. Use `SecretStr` for secrets:
    plans and logs mask it."""

    max_tokens: int = Field(64, ge=1, description="maximum number of output tokens")
    drain_seconds: float = Field(
        10, ge=0, description="seconds that requests in flight may continue after SIGTERM"
    )


def build(
    context: BuildContext,
    options: MyPluginOptions,
) -> MyPluginServer:
    """Build the server. Called once, in the front-end process, which has no tensor library."""
    from my_plugin.server import MyPluginServer

    return MyPluginServer(options)


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "completes a prompt sent by POST to any path, as plain text",
    build,
    MyPluginOptions,
    # `auto` selects the highest priority; `openai` has 50. Below 0: used only on request.
    priority=-10,
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_servers() -> list[Provider[MyPluginServer]]:
    return [PROVIDER]
