"""From a prompt and sampling parameters to a `Request` that the engine can run, or an
`InvalidRequest`."""

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
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields of generation_config.json that requests take over."""

MAX_SALT_CHARS = 256
MAX_TOKEN_CHARS = 256
"""No token is longer, so a text of more than this times the context cannot fit: it is refused
before the work."""
_counter = itertools.count()


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Fields of `SamplingParams` that a model's generation_config.json sets; a request overrides
    them.

    Raises `CheckpointError`, naming file and field, for values that no request could have.
    """
    path = folder / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    if config.get("do_sample") is False:
        return {}
    found = {name: config[name] for name in SAMPLING_DEFAULTS if config.get(name) is not None}
    try:
        SamplingParams(**found)
    except InvalidRequest as e:
        raise CheckpointError(f"{path}: {e.message}") from None
    return found


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class RequestMaker:
    """Tokenizes and checks against one model. Holds no state that requests change."""

    def __init__(self, model: ModelFacts, max_model_len: int, tokenizer: Tokenizer | None) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.tokenizer = tokenizer

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
    ) -> Request:
        """Raises `InvalidRequest`, naming the field, for a prompt or parameters that this model
        cannot take."""
        check_range("priority", priority, -(2**31), 2**31 - 1)
        if cache_salt is not None and not (
            isinstance(cache_salt, str) and 0 < len(cache_salt) <= MAX_SALT_CHARS
        ):
            given = (
                f"{len(cache_salt)} characters"
                if isinstance(cache_salt, str)
                else repr(cache_salt)[:100]
            )
            what = f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters, not {given}"
            raise InvalidRequest(what, param="cache_salt")
        for param, texts in (
            ("cache_salt", [cache_salt or ""]),
            ("stop", params.stop),
            ("request_id", [request_id or ""]),
        ):
            if not all(_is_unicode(text) for text in texts):
                raise InvalidRequest(
                    f"{param} is not valid Unicode: it holds a lone surrogate", param=param
                )
        token_ids = self.encode(prompt, add_special_tokens=add_special_tokens)
        room = self.max_model_len - len(token_ids)
        if room < 0 or (room == 0 and params.max_tokens != 0):
            raise InvalidRequest(
                f"the prompt has {len(token_ids)} tokens and the context is {self.max_model_len}"
                f"{', which leaves no room for an answer' if room == 0 else ''}",
                param="prompt",
            )
        if params.max_tokens is not None and params.max_tokens > self.max_model_len:
            raise InvalidRequest(
                f"max_tokens {params.max_tokens} is above the context of {self.max_model_len}",
                param="max_tokens",
            )
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        if params.min_tokens > max_tokens:
            params = msgspec.structs.replace(params, min_tokens=max_tokens, max_tokens=max_tokens)
        if params.stop and self.tokenizer is None:
            raise InvalidRequest(
                "stop strings need a tokenizer, and this model has none", param="stop"
            )
        return Request(
            request_id=request_id or f"{next(_counter):x}-{secrets.token_hex(4)}",
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=max_tokens,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            eos_token_ids=[] if params.ignore_eos else list(self.model.eos_token_ids),
            priority=priority,
            arrival=time.time(),
            cache_salt=cache_salt,
        )

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, checked."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest(
                    "this model has no tokenizer: give the prompt as a list of token ids",
                    param="prompt",
                )
            if len(prompt) > self.max_model_len * MAX_TOKEN_CHARS:
                raise InvalidRequest(
                    f"the prompt has {len(prompt)} characters, more than a context of"
                    f" {self.max_model_len} tokens can hold",
                    param="prompt",
                )
            token_ids = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            token_ids = list(prompt)
        if not token_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        self._check_ids("prompt", token_ids)
        return token_ids

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation: `Tokenizer.encode_chat`, for this model."""
        if self.tokenizer is None:
            raise InvalidRequest(
                "chat needs a tokenizer, and this model has none", param="messages"
            )
        return self.tokenizer.encode_chat(
            messages, max_chars=self.max_model_len * MAX_TOKEN_CHARS, **options
        )

    def _check_ids(self, param: str, token_ids: Sequence[int] | dict[int, float]) -> None:
        for token in token_ids:
            if (
                not isinstance(token, int)
                or isinstance(token, bool)
                or not 0 <= token < self.model.vocab_size
            ):
                raise InvalidRequest(
                    f"{param}: token id {token!r} is not in the vocabulary of"
                    f" {self.model.vocab_size}",
                    param=param,
                )
