from __future__ import annotations
import re
from collections.abc import Callable, Iterator
from typing import Any

class ControlTokens:
    MARKERS = ''.join(map(chr, range(57344, 63744)))

    def __init__(self, tokens: list[str]) -> None:
        ...

    def marker(self, messages: Any) -> str | None:
        ...

    def marked(self, messages: Any, marker: str) -> Any:
        ...

    def parts(self, rendered: str, marker: str) -> list[str]:
        ...
