"""A scheduler: the hook, and what this package offers. Imported whenever an engine is composed, so
nothing heavy here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.scheduler import SchedulerCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Provider, SchedulerOptions

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.scheduler import MyPluginScheduler


class MyPluginOptions(SchedulerOptions):
    """`max_num_seqs` and `max_num_batched_tokens` are inherited: workers and caches are sized by
    them. Add your own fields."""


# What it promises beyond the contract: requests that wait together begin in order of arrival.
# Without a promise leave it out.
CAPABILITIES = SchedulerCapabilities(order="arrival")


def build(context: BuildContext, options: MyPluginOptions) -> MyPluginScheduler:
    """Called once the KV cache is there."""
    from my_plugin.scheduler import MyPluginScheduler

    assert context.kv is not None
    return MyPluginScheduler(context.kv, options)


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "first come, first served, in sixty lines",
    build,
    MyPluginOptions,
    CAPABILITIES,
    priority=-10,  # `auto` takes the highest: the core's own has 50. Below 0: only when asked for
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_schedulers() -> list[Provider[MyPluginScheduler]]:
    return [PROVIDER]
