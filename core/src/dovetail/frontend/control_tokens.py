"""Prevent user text that looks like a control token from being encoded as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any


class ControlTokens:
    """The control tokens (special tokens) of a tokenizer, and how to mark user text that looks like
    one.

    A marker, which is a character that no message contains, is inserted after the first character
    of such text before the template is rendered. The text can then be found in the rendered
    template and told apart from the template's own control tokens.
    """

    MARKERS = "".join(map(chr, range(0xE000, 0xF900)))
    """Private-use characters, to which Unicode assigns no meaning."""

    def __init__(self, tokens: list[str]) -> None:
        long_first = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
        self._tokens = long_first
        self._pattern = re.compile("|".join(map(re.escape, long_first))) if long_first else None

    def marker(self, messages: Any) -> str | None:
        """Return a marker for these messages; None if none of their text looks like a control
        token."""
        pattern, texts = self._pattern, list(_texts(messages))
        if pattern is None or not any(pattern.search(text) for text in texts):
            return None
        used = set().union(*texts)
        return next(m for m in self.MARKERS if m not in used)

    def marked(self, messages: Any, marker: str) -> Any:
        """Return the messages with markers."""
        pattern = self._pattern
        assert pattern is not None
        return _map_texts(
            messages, lambda text: pattern.sub(lambda m: f"{m[0][0]}{marker}{m[0][1:]}", text)
        )

    def parts(self, rendered: str, marker: str) -> list[str]:
        """Split a rendered template. Parts alternate between text with the template's control
        tokens and user text that looks like a control token."""
        marked = "|".join(re.escape(f"{t[0]}{marker}{t[1:]}") for t in self._tokens)
        return [part.replace(marker, "") for part in re.split(f"({marked})", rendered)]


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list) else value
