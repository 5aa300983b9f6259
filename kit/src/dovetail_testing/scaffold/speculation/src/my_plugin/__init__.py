"""Register a drafter and, because it is so short, implement it.

The engine verifies every proposal with the model, so a drafter can change the speed of an engine,
but never its output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.drafter import DrafterCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import DrafterOptions, Provider
from dovetail.sequence import Sequence

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext


class MyPluginOptions(DrafterOptions):
    """Options. `num_draft_tokens` is inherited. Add your own fields, each with a default and a
    description."""


class MyPluginDrafter:
    """A `Drafter`; one object per engine. It may store data about a sequence, by `seq_id`, until
    `forget`."""

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        """Propose the last token again if it occurred twice in a row. `seq` is read-only; an empty
        list means that there is no good proposal."""
        return seq.tokens[-1:] * max_tokens if seq.tokens[-1:] == seq.tokens[-2:-1] else []

    def forget(self, seq_id: int) -> None:
        """Do nothing: no data about the sequence was stored."""


def build(
    context: BuildContext,
    options: MyPluginOptions,
) -> MyPluginDrafter:
    """Build the drafter. Called once, in the engine process, with the options of the engine
    config."""
    return MyPluginDrafter()


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "proposes to repeat a token that was just repeated",
    build,
    MyPluginOptions,
    # The proposals depend on the sequence alone, not on other requests.
    DrafterCapabilities(),
    # Used by `auto`; without `speculation:` in the engine config there is no drafting.
    priority=-10,
)


@hookimpl  # the function's name is the hook's name: a misspelt one is an error
def dovetail_drafters() -> list[Provider[MyPluginDrafter]]:
    return [PROVIDER]
