"""A prefix cache: the hook, and what this package offers. Imported whenever an engine is composed,
so nothing heavy here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.index import MyPluginIndex


class MyPluginOptions(Options):
    """What a user may write beside `use: my-plugin`. Add fields, each with a default and a
    description."""


def build(context: BuildContext, options: MyPluginOptions) -> MyPluginIndex:
    """Called before the KV-cache manager is built, which is given what this returns."""
    from my_plugin.index import MyPluginIndex

    return MyPluginIndex(context.kv_groups[0].block_size, len(context.kv_groups))


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "a dictionary of all beginnings, the oldest given up first",
    build,
    MyPluginOptions,
    priority=-10,  # `auto` takes the highest: `hash` has 50. Below 0: only when asked for
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_prefix_caches() -> list[Provider[MyPluginIndex]]:
    return [PROVIDER]
