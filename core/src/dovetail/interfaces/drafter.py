"""Drafting: guesses at a sequence's next tokens, which the target model verifies many at a time.

Verification is the engine's. The target's token at every position is sampled as always, with noise
keyed by seed and position, and a draft counts while it equals what was sampled (speculative
decoding with a shared source of randomness). So a drafter can make an engine slower or faster,
never different.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from dovetail.sequence import Sequence


@dataclass(frozen=True)
class DrafterCapabilities:
    runs_in: Literal["engine", "worker"] = "engine"
    """engine: the loop asks for tokens between two steps. worker: it asks how many, and the worker
    drafts them itself, in the step that verifies them, with the model that the options name
    (`DraftModelOptions`). Either way a step with drafts is not overlapped."""
    learns_from_other_requests: bool = False
    """Proposals depend on what other requests said. Without it they follow from the sequence's own
    tokens alone."""


class Drafter(Protocol):
    """One object an engine. It may keep what it likes about a sequence, by `seq_id`, until
    `forget`."""

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        """Guess the tokens after `seq.tokens`: at most `max_tokens`, in order, and none at all if
        there is no good guess.

        Asked between steps of a sequence that decodes, as often as that is worth it; while a step
        runs too, just to see whether there is something to propose. `seq` is to be read only.
        Between two calls `seq.tokens` has grown, or is as it was, and its beginning has not
        changed: an index of it can be kept and extended. An exception, or tokens that do not exist,
        fail the request.

        A drafter that runs in the worker answers with `DRAFTED_BY_WORKER` for each token that the
        worker is to draft.
        """

    def forget(self, seq_id: int) -> None:
        """The sequence has ended, however it did: keep nothing of it, for its `seq_id` may come
        again. Also called for sequences that were never asked about."""


CONTRACT = "0.1"
