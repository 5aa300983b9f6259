"""Drafting with a smaller model of the same tokenizer: the worker loads it and drafts, this says
with what, and how many."""

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
    """A `Drafter` that leaves every token to the worker."""

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        return [DRAFTED_BY_WORKER] * max_tokens

    def forget(self, seq_id: int) -> None:
        """Nothing was kept: what there is to know of a sequence, the worker knows."""


def _why_not(context: Context) -> list[Reason]:
    if context.needs.get("by_name", True):
        return []
    return [
        Reason("the draft model must be named", "set speculation: {use: draft-model, model: NAME}")
    ]


def _build(context: BuildContext, options: DraftModelOptions) -> DraftModel:
    return DraftModel()


@hookimpl
def dovetail_drafters() -> list[Provider[DraftModel]]:
    return [
        Provider(
            "draft-model",
            "a smaller model of the same tokenizer, on the same worker",
            _build,
            DraftModelOptions,
            DrafterCapabilities(runs_in="worker"),
            why_not=_why_not,
            priority=40,
        )
    ]
