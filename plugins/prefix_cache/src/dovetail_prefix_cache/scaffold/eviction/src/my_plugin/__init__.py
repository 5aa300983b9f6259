"""An eviction policy: the hook, what this package offers, and, since it is so short, the policy
itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext


class MyPluginPolicy:
    """An `EvictionPolicy`: an order among the blocks that are kept and that no sequence uses. It
    keeps that contract by shape: nothing has to be imported from the package that opened the
    extension point.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blocks: dict[int, None] = {}  # in the order in which they came

    def add(self, block_id: int) -> None:
        """A block is no longer in use. Of one sequence the last come first: without the earlier
        ones they are useless."""
        self._blocks[block_id] = None

    def remove(self, block_id: int) -> None:
        """A block that is here is in use again: somebody asked for what it holds."""
        del self._blocks[block_id]

    def pop(self) -> int:
        """Give up the least valuable block: here, the one that has been here longest."""
        block_id = next(iter(self._blocks))
        del self._blocks[block_id]
        return block_id

    def clear(self) -> None:
        """All is forgotten."""
        self._blocks.clear()


def build(context: BuildContext, options: Options) -> type[MyPluginPolicy]:
    """One policy is made for each KV group, so what is built is what makes them."""
    return MyPluginPolicy


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "the block that has been unused longest goes first",
    build,
    Options,  # none of its own
    priority=-10,  # `auto` takes the highest: `lru` has 50. Below 0: only when asked for
)


# The hook is the prefix cache's own: where that is not installed the hook does not exist, and that
# is no mistake.
@hookimpl(optionalhook=True)
def dovetail_eviction_policies() -> list[Provider[type[MyPluginPolicy]]]:
    return [PROVIDER]
