"""Register an eviction policy. It is short enough to be defined here too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext


class MyPluginPolicy:
    """The eviction order of cached blocks that no sequence uses.

    It implements the protocol `EvictionPolicy` without importing the package that defines it.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blocks: dict[int, None] = {}  # in the order in which they were added

    def add(self, block_id: int) -> None:
        """Add a block that is no longer in use. The last blocks of a sequence are added first: they
        are useless without the earlier ones."""
        self._blocks[block_id] = None

    def remove(self, block_id: int) -> None:
        """Remove a block of the policy that is in use again, because its content was requested."""
        del self._blocks[block_id]

    def pop(self) -> int:
        """Remove and return the least valuable block, here the one that was added first."""
        block_id = next(iter(self._blocks))
        del self._blocks[block_id]
        return block_id

    def clear(self) -> None:
        """Remove all blocks."""
        self._blocks.clear()


def build(context: BuildContext, options: Options) -> type[MyPluginPolicy]:
    """Return the class, because one policy is created per KV group."""
    return MyPluginPolicy


PROVIDER = Provider(
    "my-plugin",  # name in an engine config
    "evicts the block that has been unused for longest",
    build,
    Options,  # no options
    priority=-10,  # `auto` selects the highest; `lru` has 50. Below 0: used only on request.
)


# The prefix cache plugin defines this hook. `optionalhook` allows this package to load without it.
@hookimpl(optionalhook=True)
def dovetail_eviction_policies() -> list[Provider[type[MyPluginPolicy]]]:
    return [PROVIDER]
