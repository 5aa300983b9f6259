"""Convert token ids to text incrementally: never half a character, and nothing past a stop string.

There are two implementations, selected by the tokenizer's decoder. If each token stands for bytes
(ByteLevel, as in GPT-2, Llama 3 and Qwen), the bytes go through one incremental UTF-8 decoder. If
the text of a token depends on the tokens next to it (SentencePiece with byte fallback, WordPiece),
tokens are decoded together with the ones before them.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from dovetail.frontend.tokenizer import REPLACEMENT, Tokenizer

MAX_HELD_TOKENS = 16
"""Number of tokens without complete text after which the oldest are returned anyway: no character
has so many tokens."""
_CHARACTER = 4
"""Maximum number of bytes of a UTF-8 character, and therefore of tokens."""
_CONTEXT = _CHARACTER + 2
"""Number of prompt tokens that the text of the first new token may depend on."""


class Detokenizer(Protocol):
    """Incremental decoder of one sequence. The concatenated text does not depend on how the tokens
    are split between calls."""

    def push(self, token_ids: list[int]) -> str:
        """Add one or more tokens; return the text that is now complete, possibly empty."""

    def flush(self) -> str:
        """Return the remaining text, incomplete characters included, at the end of the sequence."""


def detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: list[int], *, skip_special_tokens: bool = True
) -> Detokenizer:
    """Create a detokenizer for the tokens that follow a prompt. A character that the prompt leaves
    incomplete belongs to the text."""
    token_bytes = tokenizer.token_bytes(skip_special_tokens)
    if token_bytes is not None:
        return _ByBytes(token_bytes, prompt_token_ids)
    return _ByWindow(tokenizer, prompt_token_ids, skip_special_tokens)


class _ByBytes:
    """A detokenizer for tokens that stand for bytes."""

    def __init__(self, token_bytes: dict[int, bytes], prompt_token_ids: list[int]) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token in reversed(prompt_token_ids):
            tail = token_bytes[token] + tail
            if len(tail) >= _CHARACTER:
                break
        # Drop the end of a character whose beginning is not in the tail.
        self._decoder.decode(tail.lstrip(bytes(range(0x80, 0xC0))))
        self._of_prompt = self._decoder.getstate()[0].decode("utf-8", "replace")
        """Text of the prompt for the character that it leaves incomplete; not repeated if the
        character is never completed."""

    def push(self, token_ids: list[int]) -> str:
        known = self._bytes
        return self._without_prompt(
            self._decoder.decode(b"".join([known[token] for token in token_ids]))
        )

    def flush(self) -> str:
        return self._without_prompt(self._decoder.decode(b"", True))

    def _without_prompt(self, text: str) -> str:
        if self._of_prompt and text:
            text, self._of_prompt = text.removeprefix(self._of_prompt), ""
        return text


class _ByWindow:
    """A detokenizer that decodes a window of tokens at each step: the text of `ids[prefix:read]`
    has been returned, that of `ids[read:]` has not.

    Text that ends in an incomplete character waits for the next token. Tokens that never have text
    (skipped special tokens, ids outside the vocabulary) do not enter the window, which keeps it
    short.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: list[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._is_hidden = tokenizer.hidden_tokens(skip_special_tokens)
        tail: list[int] = []
        for token in reversed(prompt_token_ids):
            if not self._is_hidden[token]:
                tail.insert(0, token)
                if len(tail) == _CONTEXT + _CHARACTER - 1:
                    break
        self._ids = tail
        self._prefix, self._read = self._clean_window()
        self._known = self._decode(self._prefix, self._read)
        self._of_prompt = self._decode(self._prefix, len(tail))
        """Text of the window with the character that the prompt leaves incomplete, as it appears in
        the prompt."""

    def _clean_window(self) -> tuple[int, int]:
        """Return (prefix, read) of the shortest window that neither begins nor ends inside a
        character of the prompt and leaves as few tokens as possible for later."""
        num_ids = len(self._ids)
        usual = max(0, num_ids - _CONTEXT)
        for read in range(num_ids, max(-1, num_ids - _CHARACTER), -1):
            for prefix in range(min(usual, read), max(-1, usual - _CHARACTER), -1):
                text = self._decode(prefix, read)
                if not (text.startswith(REPLACEMENT) or text.endswith(REPLACEMENT)):
                    return prefix, read
        return usual, num_ids

    def push(self, token_ids: list[int]) -> str:
        # One by one: the text of invalid bytes depends on how they are split.
        return "".join([self._push(token) for token in token_ids if not self._is_hidden[token]])

    def _push(self, token: int) -> str:
        self._ids.append(token)
        end = len(self._ids)
        text = self._decode(self._prefix, end)
        if not text.endswith(REPLACEMENT):
            return self._give(text, end)
        if end - self._read > MAX_HELD_TOKENS:
            # A run of invalid bytes: those older than the longest character cannot become one.
            end -= _CHARACTER
            return self._give(self._decode(self._prefix, end), end)
        return ""

    def flush(self) -> str:
        end = len(self._ids)
        return self._give(self._decode(self._prefix, end), end)

    def _give(self, text: str, end: int) -> str:
        known = self._known
        if self._of_prompt:
            if text.startswith(self._of_prompt):
                known = self._of_prompt
            self._of_prompt = ""
        # Bytes that do not continue those before them can change how those are decoded: then only
        # the new tokens count.
        new = text[len(known) :] if text.startswith(known) else self._decode(self._read, end)
        if new:
            self._prefix, self._read = self._read, end
            self._known = self._decode(self._prefix, end)
            if self._prefix > 1024:
                del self._ids[: self._prefix]
                self._read -= self._prefix
                self._prefix = 0
        elif end - self._read > MAX_HELD_TOKENS:
            # So many tokens without text: drop them, or the window would keep growing.
            del self._ids[self._read : end]
        return new

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=self._skip)


class StopStrings:
    """Finds the stop string that is completed first, and holds back text that may be the beginning
    of one."""

    def __init__(self, stop: tuple[str, ...], *, include: bool = False) -> None:
        self._stop = stop
        self._include = include
        self._longest = max(map(len, stop), default=0)
        self._held = ""

    def push(self, text: str, *, check: bool = True) -> tuple[str, str | None]:
        """Add text; return (text to output, stop string or None).

        If `check` is false (before `min_tokens`), stop strings are ignored and nothing is held
        back.
        """
        if not self._stop:
            return text, None
        buffer = self._held + text
        if not check:
            self._held = ""
            return buffer, None
        found = [
            (at + len(s), order, at, s)
            for order, s in enumerate(self._stop)
            if (at := buffer.find(s)) >= 0
        ]
        if found:
            end, _, at, stop = min(found)
            self._held = ""
            return buffer[: end if self._include else at], stop
        keep = self._num_to_hold(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def flush(self) -> str:
        """Return the text held back, at the end of a sequence without a stop string."""
        held, self._held = self._held, ""
        return held

    def _num_to_hold(self, buffer: str) -> int:
        for size in range(min(self._longest - 1, len(buffer)), 0, -1):
            tail = buffer[-size:]
            if any(s.startswith(tail) for s in self._stop):
                return size
        return 0
