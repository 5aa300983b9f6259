"""Text of users that reads like a control token, kept from becoming one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any


class ControlTokens:
    """The control tokens (special ones) of a tokenizer, where users' text reads like them.

    A marker, a character that no message holds, is put behind the first character of such a text
    before the template sees it: then it can be found in what the template made of the messages, and
    told from the template's own control tokens.
    """

    MARKERS = "".join(map(chr, range(0xE000, 0xF900)))
    """Characters for private use: Unicode gives them no meaning."""

    def __init__(self, tokens: list[str]) -> None:
        long_first = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
        self._tokens = long_first
        self._pattern = re.compile("|".join(map(re.escape, long_first))) if long_first else None

    def marker(self, messages: Any) -> str | None:
        """A marker for these messages; None if no text in them reads like a control token."""
        pattern, texts = self._pattern, list(_texts(messages))
        if pattern is None or not any(pattern.search(text) for text in texts):
            return None
        used = set().union(*texts)
        return next(m for m in self.MARKERS if m not in used)

    def marked(self, messages: Any, marker: str) -> Any:
        """The messages, with markers."""
        pattern = self._pattern
        assert pattern is not None
        return _map_texts(
            messages, lambda text: pattern.sub(lambda m: f"{m[0][0]}{marker}{m[0][1:]}", text)
        )

    def parts(self, rendered: str, marker: str) -> list[str]:
        """In turn: text with the template's control tokens, and a text that reads like a control
        token and is none."""
        marked = "|".join(re.escape(f"{t[0]}{marker}{t[1:]}") for t in self._tokens)
        return [part.replace(marker, "") for part in re.split(f"({marked})", rendered)]


def _texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value, those of keys too."""
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
