from __future__ import annotations
import codecs
from typing import Protocol
from dovetail.frontend.tokenizer import REPLACEMENT, Tokenizer
MAX_HELD_TOKENS = 16

class Detokenizer(Protocol):

    def push(self, token_ids: list[int]) -> str:
        ...

    def flush(self) -> str:
        ...

def detokenizer(tokenizer: Tokenizer, prompt_token_ids: list[int], *, skip_special_tokens: bool=True) -> Detokenizer:
    ...

class StopStrings:

    def __init__(self, stop: tuple[str, ...], *, include: bool=False) -> None:
        ...

    def push(self, text: str, *, check: bool=True) -> tuple[str, str | None]:
        ...

    def flush(self) -> str:
        ...
