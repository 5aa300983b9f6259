"""Register a prefix cache. This module is imported whenever an engine is composed, so it must be
light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.index import MyPluginIndex


class MyPluginOptions(Options):
    """Options beside `use: my-plugin` in an engine config. Add fields, each with a
    default and a description."""


def build(
    context: BuildContext,
    options: MyPluginOptions,
) -> MyPluginIndex:
    """Build the index. Called before the KV-cache manager, which receives the result, is built."""
    from my_plugin.index import MyPluginIndex

    return MyPluginIndex(context.kv_groups[0].block_size, len(context.kv_groups))


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "a dictionary of all prefixes, evicting the oldest first",
    build,
    MyPluginOptions,
    # `auto` selects the highest priority; `hash` has 50. Below 0: used only on request.
    priority=-10,
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_prefix_caches() -> list[Provider[MyPluginIndex]]:
    return [PROVIDER]
