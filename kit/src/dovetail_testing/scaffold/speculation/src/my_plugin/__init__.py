"""A drafter: the hook, what this package offers, and, since it is so short, the drafter itself.

The engine verifies every proposal against the model, so that a drafter makes it slower or faster
and never different.
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
    """`num_draft_tokens` is inherited. Add your own fields, each with a default and a
    description."""


class MyPluginDrafter:
    """A `Drafter`: one object an engine. It may keep what it likes about a sequence, by `seq_id`,
    until `forget`."""

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        """The last token again, if it came twice already. `seq` is to be read only; an empty list
        means: no good guess."""
        return seq.tokens[-1:] * max_tokens if seq.tokens[-1:] == seq.tokens[-2:-1] else []

    def forget(self, seq_id: int) -> None:
        """The sequence has ended. Nothing was kept."""


def build(context: BuildContext, options: MyPluginOptions) -> MyPluginDrafter:
    """Called once, in the process that computes, with the options from the engine config."""
    return MyPluginDrafter()


PROVIDER = Provider(
    "my-plugin",  # the name in an engine config
    "proposes what stutters to go on stuttering",
    build,
    MyPluginOptions,
    # it learns nothing from other requests: proposals follow from the sequence alone
    DrafterCapabilities(),
    # what `auto` goes by; without `speculation:` in the file there is no drafting at all
    priority=-10,
)


@hookimpl  # the name of the function is the hook: a misspelt one is an error
def dovetail_drafters() -> list[Provider[MyPluginDrafter]]:
    return [PROVIDER]
