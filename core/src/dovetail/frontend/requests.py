"""Build a `Request` that the engine can run from a prompt and sampling parameters, or raise
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
"""Fields of generation_config.json that are defaults for requests."""

MAX_SALT_CHARS = 256
MAX_TOKEN_CHARS = 256
"""Upper bound on the length of a token. A text longer than this times the context length cannot
fit, and is rejected before it is tokenized."""
_counter = itertools.count()


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Return the fields of `SamplingParams` that a model's generation_config.json sets. A request
    overrides them.

    Raises `CheckpointError`, naming file and field, for invalid values.
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
    """Tokenizes and checks requests for one model. It is stateless between requests."""

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
        """Build a request. Raises `InvalidRequest`, naming the field, if the model cannot serve the
        prompt or the parameters."""
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
                    f"{param} is not valid Unicode: it contains a lone surrogate", param=param
                )
        token_ids = self.encode(prompt, add_special_tokens=add_special_tokens)
        available = self.max_model_len - len(token_ids)
        if available < 0 or (available == 0 and params.max_tokens != 0):
            raise InvalidRequest(
                f"the prompt has {len(token_ids)} tokens and the context is {self.max_model_len}"
                f"{', which leaves no tokens for the output' if available == 0 else ''}",
                param="prompt",
            )
        if params.max_tokens is not None and params.max_tokens > self.max_model_len:
            raise InvalidRequest(
                f"max_tokens {params.max_tokens} exceeds the context of {self.max_model_len}",
                param="max_tokens",
            )
        max_tokens = available if params.max_tokens is None else min(params.max_tokens, available)
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        if params.min_tokens > max_tokens:
            params = msgspec.structs.replace(params, min_tokens=max_tokens, max_tokens=max_tokens)
        if params.stop and self.tokenizer is None:
            raise InvalidRequest(
                "stop strings need a tokenizer, but this model has none", param="stop"
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
        """Return the token ids of a prompt after checking them."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest(
                    "this model has no tokenizer: pass the prompt as a list of token ids",
                    param="prompt",
                )
            if len(prompt) > self.max_model_len * MAX_TOKEN_CHARS:
                raise InvalidRequest(
                    f"the prompt has {len(prompt)} characters, more than fit into a context of"
                    f" {self.max_model_len} tokens",
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
        """Return the token ids of a conversation. See `Tokenizer.encode_chat`."""
        if self.tokenizer is None:
            raise InvalidRequest(
                "chat needs a tokenizer, but this model has none", param="messages"
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
                    f" {self.model.vocab_size} tokens",
                    param=param,
                )
