"""A KV-cache manager: the hook, and what this package offers. Imported whenever an engine is
composed: nothing heavy here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import KVCacheOptions, Provider, Relation

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.manager import MyPluginBlocks


class MyPluginOptions(KVCacheOptions):
    """`block_size`, `dtype` and the memory limits are inherited: workers read them. Add your own
    fields."""


def build(context: BuildContext, options: MyPluginOptions) -> MyPluginBlocks:
    """Called once the worker has sized its memory: the number of blocks is known."""
    from my_plugin.manager import MyPluginBlocks

    return MyPluginBlocks(list(context.kv_groups), list(context.num_blocks))


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "blocks in sets, without reuse between requests",
    build,
    MyPluginOptions,
    priority=-10,  # `auto` takes the highest: the core's own has 50. Below 0: only when asked for
    # What other extension points must not take beside it, and why: the plan shows it. `requires`
    # and `untested_with` are the like.
    conflicts=(Relation("prefix_cache", ("*",), "this manager never asks a prefix cache"),),
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_kv_caches() -> list[Provider[MyPluginBlocks]]:
    return [PROVIDER]
