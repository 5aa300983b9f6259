"""Define the drafter, which proposes a sequence's next tokens for the target model to verify many
at a time.

The engine verifies draft tokens. It samples the target's token at every position as usual, with
noise keyed by seed and position, and accepts draft tokens while they equal the sampled ones
(speculative decoding with a shared source of randomness). A drafter can therefore change the speed
of an engine, but never its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from dovetail.sequence import Sequence


@dataclass(frozen=True)
class DrafterCapabilities:
    """Capabilities of a drafter, as data."""

    runs_in: Literal["engine", "worker"] = "engine"
    """engine: the loop asks for draft tokens between two steps. worker: the loop asks how many
    draft tokens to use, and the worker proposes them in the step that verifies them, with the model
    that the options name (`DraftModelOptions`). In both cases a step with draft tokens is not
    overlapped."""
    learns_from_other_requests: bool = False
    """Proposals depend on the outputs of other requests. Otherwise they depend only on the
    sequence's own tokens."""


class Drafter(Protocol):
    """Proposes draft tokens; one object per engine. It may store data about a sequence, by
    `seq_id`, until `forget`."""

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        """Propose the tokens after `seq.tokens`: at most `max_tokens`, in order, or none if there
        is no good proposal.

        Called between steps for a decoding sequence, as often as drafting pays off; also while a
        step runs, only to find out whether there is a proposal. `seq` is read-only. Between two
        calls `seq.tokens` is unchanged or has grown, and its prefix has not changed, so an index of
        it can be stored and extended. An exception, or a token id outside the vocabulary, fails the
        request.

        A drafter that runs in the worker returns `DRAFTED_BY_WORKER` for each token that the worker
        is to propose.
        """

    def forget(self, seq_id: int) -> None:
        """Delete everything about a sequence that has ended in any way; its `seq_id` may be used
        again. Also called for sequences that `propose` has never seen."""


CONTRACT = "0.1"
