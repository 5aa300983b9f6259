"""An example plugin: shortest remaining sequence first, without starving long sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Provider, SchedulerOptions

if TYPE_CHECKING:
    from dovetail_scheduler_srf.scheduler import ShortestRemainingFirst


class SrfOptions(SchedulerOptions):
    ageing: float = Field(
        1.0,
        gt=0,
        description="tokens deducted from a sequence's length for each step since its arrival",
    )


def build(context: Any, options: SrfOptions) -> ShortestRemainingFirst:
    from dovetail_scheduler_srf.scheduler import ShortestRemainingFirst

    return ShortestRemainingFirst(context.kv, options)


# No capabilities: this scheduler guarantees no order beyond the contract of every scheduler.
PROVIDER = Provider(
    "srf", "shortest remaining sequence first, with ageing", build, SrfOptions, priority=10
)


@hookimpl
def dovetail_schedulers() -> list[Provider[ShortestRemainingFirst]]:
    return [PROVIDER]
