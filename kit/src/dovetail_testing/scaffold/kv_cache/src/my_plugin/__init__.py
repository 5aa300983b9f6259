"""Register a KV-cache manager. This module is imported whenever an engine is composed, so it must
be light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import KVCacheOptions, Provider, Relation

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.manager import MyPluginBlocks


class MyPluginOptions(KVCacheOptions):
    """Options. `block_size`, `dtype` and the memory limits are inherited, because workers read
    them. Add your own fields."""


def build(
    context: BuildContext,
    options: MyPluginOptions,
) -> MyPluginBlocks:
    """Build the manager. Called when the worker has determined the number of blocks."""
    from my_plugin.manager import MyPluginBlocks

    return MyPluginBlocks(list(context.kv_groups), list(context.num_blocks))


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "sets of free blocks, without reuse between requests",
    build,
    MyPluginOptions,
    # `auto` selects the highest priority; the core's own has 50. Below 0: used only on request.
    priority=-10,
    # What other extension points must not use together with this provider, and why: the plan shows
    # it. `requires` and `untested_with` work the same way.
    conflicts=(Relation("prefix_cache", ("*",), "this manager does not use a prefix cache"),),
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_kv_caches() -> list[Provider[MyPluginBlocks]]:
    return [PROVIDER]
