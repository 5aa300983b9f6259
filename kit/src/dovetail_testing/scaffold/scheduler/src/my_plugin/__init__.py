"""Register a scheduler. This module is imported whenever an engine is composed, so it must be
light."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.scheduler import SchedulerCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Provider, SchedulerOptions

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
    from my_plugin.scheduler import MyPluginScheduler


class MyPluginOptions(SchedulerOptions):
    """Options. `max_num_seqs` and `max_num_batched_tokens` are inherited, because workers and
    caches are sized for them. Add your own fields."""


# A guarantee beyond the contract: requests that wait together start in order of arrival. Leave it
# out if there is no guarantee.
CAPABILITIES = SchedulerCapabilities(order="arrival")


def build(
    context: BuildContext,
    options: MyPluginOptions,
) -> MyPluginScheduler:
    """Build the scheduler. Called when the KV cache has been built."""
    from my_plugin.scheduler import MyPluginScheduler

    assert context.kv is not None
    return MyPluginScheduler(context.kv, options)


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "first come, first served, in about sixty lines",
    build,
    MyPluginOptions,
    CAPABILITIES,
    # `auto` selects the highest priority; the core's own has 50. Below 0: used only on request.
    priority=-10,
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_schedulers() -> list[Provider[MyPluginScheduler]]:
    return [PROVIDER]
