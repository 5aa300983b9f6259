from __future__ import annotations
import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
import tokenizers
from dovetail.errors import CheckpointError, InvalidRequest
from dovetail.facts import read_json
from dovetail.frontend.control_tokens import ControlTokens
if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment
REPLACEMENT = '�'
NAMED_TOKENS = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
LONG_TEXT = 10000
MAX_TEMPLATE_CHARS = 256 * 1024
MAX_RENDERED_CHARS = 8 * 2 ** 20

class Tokenizer:

    def __init__(self, folder: Path) -> None:
        ...

    @property
    def vocab_size(self) -> int:
        ...

    def encode(self, text: str, *, add_special_tokens: bool=True) -> list[int]:
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool=True) -> str:
        ...

    def hidden_tokens(self, skip_special_tokens: bool) -> dict[int, bool]:
        ...

    def token_bytes(self, skip_special_tokens: bool) -> dict[int, bytes] | None:
        ...

    def token_id(self, token: str) -> int | None:
        ...

    def token_text(self, token_id: int) -> str:
        ...

    def apply_chat_template(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool=True, template: str | None=None, variables: dict[str, Any] | None=None) -> str:
        ...

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool=True, template: str | None=None, variables: dict[str, Any] | None=None, add_special_tokens: bool=False, max_chars: int=MAX_RENDERED_CHARS) -> list[int]:
        ...
BYTE_OF_CHARACTER = _byte_alphabet()
