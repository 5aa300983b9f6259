"""From token ids to text, a few tokens at a time: never half a character, and nothing past a stop string."""

from __future__ import annotations

from dovetail.frontend.tokenizer import REPLACEMENT, Tokenizer

MAX_HELD_TOKENS = 16
_CHARACTER = 4
"""Most bytes, and so most tokens, of one character."""


class Detokenizer:
    """Incremental decoding of one sequence.

    Tokens are decoded together with the ones before them, because a tokenizer may join or space them by context: the
    window `ids[prefix:read]` has been given out, `ids[read:]` has not. Text that ends in an incomplete character waits
    for the next token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._pieces = tokenizer.whole_pieces(skip_special_tokens)
        self._ids = prompt_token_ids[-_CHARACTER - 2 :]
        self._prefix = 0
        self._read = len(self._ids)
        self._known = self._decode(0, self._read)

    def push(self, token_ids: list[int]) -> str:
        """Take more tokens, one or many; returns the text that is now certain, perhaps none."""
        if self._pieces is None:
            # What bytes that are no text decode to depends on how they are cut: one way, however many tokens come at once.
            return "".join([self._extend([t]) for t in token_ids])
        if self._read == len(self._ids):
            # Nothing waits, and each token's text is its own: no window is needed.
            pieces = [self._pieces[t] for t in token_ids]
            if None not in pieces:
                if self._read:
                    self._ids.clear()
                    self._prefix = self._read = 0
                    self._known = ""
                return "".join(pieces)  # type: ignore[arg-type]
        return self._extend(token_ids)

    def _extend(self, token_ids: list[int]) -> str:
        self._ids += token_ids
        num_ids = len(self._ids)
        # An incomplete character at the end waits; with it, as few tokens as possible.
        for end in range(num_ids, num_ids - min(len(token_ids), _CHARACTER + 1), -1):
            text = self._decode(self._prefix, end)
            if not text.endswith(REPLACEMENT):
                return self._give(text, end)
        if num_ids - self._read > MAX_HELD_TOKENS:
            # A run of bytes that is no text: what is older than any character can be will not become one.
            end = num_ids - _CHARACTER
            return self._give(self._decode(self._prefix, end), end)
        return ""

    def flush(self) -> str:
        """The rest, incomplete characters included; the sequence has ended."""
        return self._give(self._decode(self._prefix, len(self._ids)), len(self._ids))

    def _give(self, text: str, end: int) -> str:
        new = text[len(self._known) :]
        if new:
            self._prefix, self._read = self._read, end
            self._known = self._decode(self._prefix, end)
            if self._prefix > 1024:
                del self._ids[: self._prefix]
                self._read -= self._prefix
                self._prefix = 0
        return new

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=self._skip)


class StopStrings:
    """Finds the stop string that is completed first, and holds back text that may be the start of one."""

    def __init__(self, stop: tuple[str, ...], *, include: bool = False) -> None:
        self._stop = stop
        self._include = include
        self._longest = max(map(len, stop), default=0)
        self._held = ""

    def push(self, text: str, *, check: bool = True) -> tuple[str, str | None]:
        """Take more text; returns (text to give out, the stop string found or None).

        With `check` false (before `min_tokens`) no stop string counts and nothing is held.
        """
        if not self._stop:
            return text, None
        buffer = self._held + text
        if not check:
            self._held = ""
            return buffer, None
        found = [(at + len(s), order, at, s) for order, s in enumerate(self._stop) if (at := buffer.find(s)) >= 0]
        if found:
            end, _, at, stop = min(found)
            self._held = ""
            return buffer[: end if self._include else at], stop
        keep = self._num_to_hold(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def flush(self) -> str:
        """What was held; the sequence has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _num_to_hold(self, buffer: str) -> int:
        for size in range(min(self._longest - 1, len(buffer)), 0, -1):
            tail = buffer[-size:]
            if any(s.startswith(tail) for s in self._stop):
                return size
        return 0
