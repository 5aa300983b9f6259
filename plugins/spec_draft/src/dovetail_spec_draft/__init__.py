"""Register drafting with a smaller model that has the same tokenizer. The worker loads and runs the
draft model; this plugin selects the model and the number of draft tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.drafter import DrafterCapabilities
from dovetail.plan import Reason
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Context, DraftModelOptions, Provider
from dovetail.sequence import Sequence
from dovetail.types import DRAFTED_BY_WORKER

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext


class DraftModel:
    """A `Drafter` whose tokens are all drafted by the worker."""

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        return [DRAFTED_BY_WORKER] * max_tokens

    def forget(self, seq_id: int) -> None:
        """Do nothing: the worker keeps the state of sequences."""


def _why_not(context: Context) -> list[Reason]:
    if context.needs.get("by_name", True):
        return []
    return [
        Reason("no draft model is specified", "set speculation: {use: draft-model, model: NAME}")
    ]


def _build(context: BuildContext, options: DraftModelOptions) -> DraftModel:
    return DraftModel()


@hookimpl
def dovetail_drafters() -> list[Provider[DraftModel]]:
    return [
        Provider(
            "draft-model",
            "a smaller model with the same tokenizer, on the same worker",
            _build,
            DraftModelOptions,
            DrafterCapabilities(runs_in="worker"),
            why_not=_why_not,
            priority=40,
        )
    ]
