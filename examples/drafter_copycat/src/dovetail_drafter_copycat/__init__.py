"""An example plugin: a drafter that searches for an earlier occurrence of the last `match_len`
tokens and proposes the tokens that followed them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dovetail.interfaces.drafter import DrafterCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import DrafterOptions, Provider
from dovetail.sequence import Sequence


class CopycatOptions(DrafterOptions):
    match_len: int = Field(
        2, ge=1, le=8, description="number of last tokens that must match an earlier occurrence"
    )


class Copycat:
    """A `Drafter` with an index per sequence: the position after the last occurrence of each run of
    `match_len` tokens."""

    def __init__(self, options: CopycatOptions) -> None:
        self._match_len = options.match_len
        self._seen: dict[int, dict[tuple[int, ...], int]] = {}
        self._num_indexed: dict[int, int] = {}

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        tokens, n = seq.tokens, self._match_len
        seen = self._seen.setdefault(seq.seq_id, {})
        # Only new tokens are indexed. A run that includes the last token has no continuation yet.
        for end in range(max(n, self._num_indexed.get(seq.seq_id, 0)), len(tokens)):
            seen[tuple(tokens[end - n : end])] = end
        self._num_indexed[seq.seq_id] = max(n, len(tokens))
        found = seen.get(tuple(tokens[-n:])) if len(tokens) >= n else None
        return [] if found is None else tokens[found : found + max_tokens]

    def forget(self, seq_id: int) -> None:
        self._seen.pop(seq_id, None)
        self._num_indexed.pop(seq_id, None)


def build(context: Any, options: CopycatOptions) -> Copycat:
    return Copycat(options)


PROVIDER = Provider(
    "copycat",
    "copies the tokens that followed the same tokens earlier",
    build,
    CopycatOptions,
    DrafterCapabilities(),
    priority=10,
)


@hookimpl
def dovetail_drafters() -> list[Provider[Copycat]]:
    return [PROVIDER]
