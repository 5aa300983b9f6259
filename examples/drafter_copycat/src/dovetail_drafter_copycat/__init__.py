"""An example plugin: a drafter that looks for the last two tokens earlier in the text, and copies
what followed them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dovetail.interfaces.drafter import DrafterCapabilities
from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import DrafterOptions, Provider
from dovetail.sequence import Sequence


class CopycatOptions(DrafterOptions):
    match_len: int = Field(
        2, ge=1, le=8, description="tokens that must be the same before something is copied"
    )


class Copycat:
    """Keeps, by sequence, where each run of `match_len` tokens was last followed by something."""

    def __init__(self, options: CopycatOptions) -> None:
        self._match_len = options.match_len
        self._seen: dict[int, dict[tuple[int, ...], int]] = {}
        self._num_indexed: dict[int, int] = {}

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        tokens, n = seq.tokens, self._match_len
        seen = self._seen.setdefault(seq.seq_id, {})
        # Only what is new: runs that end before the last token, because something follows them.
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
    "copies what followed the same tokens before",
    build,
    CopycatOptions,
    DrafterCapabilities(),
    priority=10,
)


@hookimpl
def dovetail_drafters() -> list[Provider[Copycat]]:
    return [PROVIDER]
