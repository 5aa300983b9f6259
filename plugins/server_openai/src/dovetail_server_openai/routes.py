"""Handle the completion and tokenization routes: convert a body to requests, run them, and convert
their deltas to JSON."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import msgspec
import orjson
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from dovetail.errors import DovetailError, InvalidRequest, ModelNotFound
from dovetail.interfaces.server import EngineClient
from dovetail.types import Request, SamplingParams
from dovetail_server_openai.answers import Answer, ChatAnswer, Choice, CompletionAnswer, usage
from dovetail_server_openai.failures import error_body
from dovetail_server_openai.guard import SALT
from dovetail_server_openai.metrics import Metrics
from dovetail_server_openai.options import ServerOptions
from dovetail_server_openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingBody,
    TokenizeRequest,
)
from dovetail_server_openai.streams import EventStream, merge_streams, run_until_disconnect

T = TypeVar("T")

LONG_TEXT = 20_000
"""Number of characters from which a text is tokenized in a thread, so that it does not delay the
streams of other requests."""
LONG_ANSWER = 5_000
"""Number of log-probabilities from which a response is serialized in a thread, for the same
reason."""
NUM_TOKENIZING = 2
"""Number of long texts tokenized at a time. Clients that send many wait for each other, and streams
do not wait for them."""
MAX_DETOKENIZED = 2**20
"""Maximum number of token ids in one /detokenize request."""


class Completions:
    """Handlers of /v1/completions, /v1/chat/completions, /tokenize and /detokenize for one
    engine."""

    def __init__(
        self,
        engine: EngineClient,
        metrics: Metrics,
        options: ServerOptions,
        defaults: dict[str, Any],
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._options = options
        self._defaults = defaults
        self._model = engine.plan.served_model_name
        self._fingerprint = engine.plan.fingerprint
        self._tokenizing = asyncio.Semaphore(NUM_TOKENIZING)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self._model:
            raise ModelNotFound(
                f"the model {name!r} does not exist; this server has {self._model!r}",
                param="model",
            )

    async def completions(self, body: CompletionRequest, http: HttpRequest) -> Response:
        self.check_model(body.model)
        self._engine.check_ready()
        body.check()
        self._check_logprobs("logprobs", body.logprobs)
        params = self._sampling(
            body, 16 if body.max_tokens is None else body.max_tokens, body.logprobs
        )
        if body.echo and body.logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=body.logprobs)
        prompts = body.prompts()
        limit = self._engine.config.max_num_waiting
        if not 0 < len(prompts) * params.n <= limit:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n = {params.n}; there must be at least one prompt,"
                f" and prompts × n can be at most {limit} (max_num_waiting)",
                param="prompt",
            )
        requests = await self._make_requests(
            prompts, params, body, http, special=body.add_special_tokens
        )
        tokenizer = self._engine.tokenizer
        echoed = (
            [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts]
            if body.echo
            else [""] * len(prompts)
        )
        return await self._answer(
            requests, body, http, CompletionAnswer(body, tokenizer, echoed, params.n)
        )

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        self.check_model(body.model)
        self._engine.check_ready()
        body.check()
        self._check_logprobs("top_logprobs", body.top_logprobs)
        if body.chat_template is not None and not self._options.allow_chat_template:
            raise InvalidRequest(
                "chat_template is not accepted from requests (allow_chat_template)",
                param="chat_template",
            )
        params = self._sampling(
            body, body.limit, (body.top_logprobs or 0) if body.logprobs else None
        )
        messages = [m.as_dict() for m in body.messages]
        encode = partial(
            self._engine.maker.encode_chat,
            messages,
            add_generation_prompt=body.add_generation_prompt,
            template=body.chat_template,
            variables=body.chat_template_kwargs,
        )
        prompt = await self._encode(encode, count_chars(messages))
        requests = await self._make_requests([prompt], params, body, http, special=False)
        return await self._answer(requests, body, http, ChatAnswer(body, self._engine.tokenizer))

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest(
                "either prompt or messages is required, and not both", param="prompt"
            )
        special = (
            body.add_special_tokens
            if body.add_special_tokens is not None
            else body.messages is None
        )
        maker, messages = self._engine.maker, [m.as_dict() for m in body.messages or ()]
        if body.messages is None:
            encode = partial(maker.encode, body.prompt or "")
        else:
            encode = partial(
                maker.encode_chat, messages, add_generation_prompt=body.add_generation_prompt
            )
        size = len(body.prompt or "") + count_chars(messages)
        tokens = await self._encode(partial(encode, add_special_tokens=special), size)
        strings = (
            [self._engine.tokenizer.token_text(t) for t in tokens]
            if body.return_token_strs
            else None
        )
        return {
            "count": len(tokens),
            "max_model_len": self._engine.plan.max_model_len,
            "tokens": tokens,
            "token_strs": strings,
        }

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        self.check_model(body.model)
        size = self._engine.maker.model.vocab_size
        if len(body.tokens) > MAX_DETOKENIZED:
            raise InvalidRequest(
                f"{len(body.tokens)} tokens; at most {MAX_DETOKENIZED} at a time", param="tokens"
            )
        if not all(0 <= t < size for t in body.tokens):
            raise InvalidRequest(f"token ids must be from 0 to {size - 1}", param="tokens")
        async with self._tokenizing:
            text = await asyncio.to_thread(
                self._engine.tokenizer.decode, body.tokens, skip_special_tokens=False
            )
        return {"prompt": text}

    def _check_logprobs(self, name: str, value: int | None) -> None:
        if value is not None and not 0 <= value <= self._options.max_logprobs:
            raise InvalidRequest(
                f"{name} must be between 0 and {self._options.max_logprobs}, not {value}",
                param=name,
            )

    def _sampling(
        self, body: SamplingBody, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        self._check_logprobs("prompt_logprobs", body.prompt_logprobs)
        return body.sampling(self._defaults, max_tokens=max_tokens, logprobs=logprobs)

    async def _encode(self, encode: Callable[[], T], num_chars: int) -> T:
        """Call `encode`, in a thread if the text is long: other requests' streams must not wait for
        it."""
        if num_chars <= LONG_TEXT:
            return encode()
        async with self._tokenizing:
            return await asyncio.to_thread(encode)

    async def _make_requests(
        self,
        prompts: list[str | list[int]],
        params: SamplingParams,
        body: SamplingBody,
        http: HttpRequest,
        *,
        special: bool,
    ) -> list[Request]:
        # Requests with different API keys must not share entries of the prefix cache.
        salt, key_salt = body.cache_salt, http.scope.get(SALT)
        if key_salt is not None:
            salt = key_salt if salt is None else f"{key_salt} {salt}"

        def make() -> list[Request]:
            make_one = partial(
                self._engine.maker.make,
                priority=body.priority,
                cache_salt=salt,
                add_special_tokens=special,
            )
            return [make_one(p, params) for p in prompts]

        requests = await self._encode(make, sum(len(p) for p in prompts if isinstance(p, str)))
        count = max_num_logprobs(requests)
        if count > self._options.max_answer_logprobs:
            raise InvalidRequest(
                f"the response would contain up to {count} log-probabilities; at most"
                f" {self._options.max_answer_logprobs} are allowed (max_answer_logprobs): request"
                " fewer alternatives, tokens or prompts",
                param="prompt_logprobs" if params.prompt_logprobs is not None else "logprobs",
            )
        return requests

    async def _answer(
        self, requests: list[Request], body: SamplingBody, http: HttpRequest, answer: Answer
    ) -> Response:
        choices = [
            Choice(i * r.params.n + k, r) for i, r in enumerate(requests) for k in range(r.params.n)
        ]
        head: dict[str, Any] = {
            "id": f"{answer.prefix}-{uuid.uuid4().hex}",
            "object": answer.kind,
            "created": int(time.time()),
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }
        if body.stream:
            return EventStream(self._events(requests, choices, body, head, answer))

        async def collect() -> None:
            async with aclosing(merge_streams(requests, self._metrics.observe)) as deltas:
                async for delta in deltas:
                    choices[delta.index].add(delta)

        await run_until_disconnect(http.receive, collect())

        def serialize() -> bytes:
            whole = [answer.full(c, c.pending) for c in choices if c.pending is not None]
            return orjson.dumps(
                {**head, "choices": whole, "usage": usage(choices), **answer.extra(choices)}
            )

        is_long = max_num_logprobs(requests) > LONG_ANSWER
        return Response(
            await asyncio.to_thread(serialize) if is_long else serialize(),
            media_type="application/json",
        )

    async def _events(
        self,
        requests: list[Request],
        choices: list[Choice],
        body: SamplingBody,
        head: dict[str, Any],
        answer: Answer,
    ) -> AsyncGenerator[bytes]:
        """Yield the events of a stream. Errors before the first event are raised; later ones are
        sent as an event."""
        options = body.stream_options
        with_usage = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        extra, started = answer.extra(choices), False

        def event(element: dict[str, Any]) -> bytes:
            nonlocal extra
            data = {**head, **extra, "choices": [element]}
            extra = {}
            if with_usage:
                data["usage"] = usage(choices) if continuous else None
            return _event(data)

        try:
            async with aclosing(merge_streams(requests, self._metrics.observe)) as deltas:
                async for delta in deltas:
                    choice, events = choices[delta.index], b""
                    new = choice.add(delta)
                    if (
                        not choice.started
                        and (first_chunk := answer.first_chunk(choice)) is not None
                    ):
                        events = event(first_chunk)
                        choice.started = True
                    if new.text or new.finish_reason:
                        events += event(answer.chunk(choice, new))
                        choice.started, choice.pending = True, None
                    if events:
                        started = True
                        yield events
            if with_usage:
                yield _event({**head, "choices": [], "usage": usage(choices)})
        except DovetailError as e:
            if not started:
                raise
            yield _event(error_body(e.message, e.http_status, e.param))
        yield b"data: [DONE]\n\n"


def count_chars(messages: list[dict[str, Any]]) -> int:
    """Return the number of characters in the contents of the messages. Roles and other fields are
    short."""
    return sum(len(m.get("content") or "") for m in messages)


def max_num_logprobs(requests: list[Request]) -> int:
    """Return an upper bound on the number of log-probabilities in the response to these
    requests."""
    total = 0
    for r in requests:
        if r.params.prompt_logprobs is not None:
            total += len(r.prompt_token_ids) * (r.params.prompt_logprobs + 1)
        if r.params.logprobs is not None:
            total += r.params.n * r.max_tokens * (r.params.logprobs + 1)
    return total


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"
