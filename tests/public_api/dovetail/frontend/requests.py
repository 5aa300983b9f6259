from __future__ import annotations
import itertools
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
import msgspec
from dovetail.errors import CheckpointError, InvalidRequest
from dovetail.facts import ModelFacts, read_json
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.types import Request, SamplingParams, check_range
Prompt = str | Sequence[int]
SAMPLING_DEFAULTS = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
MAX_SALT_CHARS = 256
MAX_TOKEN_CHARS = 256

def sampling_defaults(folder: Path) -> dict[str, Any]:
    ...

class RequestMaker:

    def __init__(self, model: ModelFacts, max_model_len: int, tokenizer: Tokenizer | None) -> None:
        ...

    def make(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None=None, priority: int=0, cache_salt: str | None=None, add_special_tokens: bool=True) -> Request:
        ...

    def encode(self, prompt: Prompt, *, add_special_tokens: bool=True) -> list[int]:
        ...

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        ...
