"""The two completion routes: one way from a body to requests, from requests to a merged stream, and from there to JSON."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
import orjson
from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse

from dovetail.errors import DovetailError, InvalidRequest, ModelNotFound
from dovetail.frontend.outputs import Delta
from dovetail.serving import AsyncEngine
from dovetail.types import Request
from dovetail_server_openai import ServerOptions
from dovetail_server_openai.answers import Choice, CompletionLogprobs, chat_logprobs, prompt_logprobs, usage
from dovetail_server_openai.failures import error_body
from dovetail_server_openai.metrics import Metrics
from dovetail_server_openai.protocol import ChatRequest, CompletionRequest, Sampled

T = TypeVar("T")
Chunk = Callable[[Choice, Delta, bool], dict[str, Any]]
"""(choice so far, news, whether it is the choice's first) → one element of a chunk's `choices`"""


class Completions:
    """Handlers of /v1/completions and /v1/chat/completions for one engine."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, options: ServerOptions, defaults: dict[str, Any]) -> None:
        self._engine = engine
        self._metrics = metrics
        self._max_logprobs = options.max_logprobs
        self._defaults = defaults

    @property
    def _model(self) -> str:
        return self._engine.plan.served_model_name

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self._model:
            raise ModelNotFound(f"the model {name!r} is not served here; {self._model!r} is", param="model")

    async def completions(self, body: CompletionRequest, http: HttpRequest) -> Response:
        self.check_model(body.model)
        self._engine.check_ready()
        if body.suffix:
            raise InvalidRequest("suffix: this model does not fill in the middle", param="suffix")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise InvalidRequest("best_of is not supported: use n", param="best_of")
        self._check_logprobs("logprobs", body.logprobs)
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens is at least 1, or 0 with echo", param="max_tokens")
        params = body.sampling(
            self._defaults, max_tokens=16 if body.max_tokens is None else body.max_tokens, logprobs=body.logprobs
        )
        if body.echo and body.logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=body.logprobs)
        prompts = body.prompts()
        if not prompts:
            raise InvalidRequest("the prompt is empty", param="prompt")
        make = self._engine.maker.make
        requests = [
            make(p, params, priority=body.priority, add_special_tokens=body.add_special_tokens) for p in prompts
        ]
        tokenizer = self._engine.tokenizer
        texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts] if body.echo else [""] * len(prompts)
        logprobs = [CompletionLogprobs(tokenizer) for _ in range(len(prompts) * params.n)]

        def element(choice: Choice, delta: Delta, first: bool) -> dict[str, Any]:
            prompt = texts[choice.index // params.n] if first else ""
            positions: list[Any] = list(delta.logprobs)
            if first and body.echo:
                positions = [choice.request.prompt_token_ids[0], *delta.prompt_logprobs, *positions]
            out: dict[str, Any] = {
                "index": choice.index,
                "text": prompt + delta.text,
                "logprobs": None if body.logprobs is None else logprobs[choice.index].take(positions),
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
            }
            if body.return_token_ids:
                out["token_ids"] = delta.token_ids
                if first:
                    out["prompt_token_ids"] = choice.request.prompt_token_ids
            if body.prompt_logprobs is not None:
                out["prompt_logprobs"] = prompt_logprobs(choice, tokenizer)
            return out

        head = self._head("cmpl", "text_completion")
        if body.stream:
            return await self._stream(requests, body, head, element)

        def whole(choice: Choice) -> dict[str, Any]:
            return element(choice, _as_delta(choice), True)

        return await self._unary(requests, http, head, whole)

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        self.check_model(body.model)
        self._engine.check_ready()
        if body.tools or body.response_format not in (None, {"type": "text"}):
            what = "tools" if body.tools else "response_format"
            raise InvalidRequest(f"{what}: not supported by this server yet", param=what)
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        self._check_logprobs("top_logprobs", body.top_logprobs)
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if limit == 0:
            raise InvalidRequest("max_tokens is at least 1", param="max_tokens")
        params = body.sampling(self._defaults, max_tokens=limit, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        tokenizer = self._engine.tokenizer
        text = tokenizer.apply_chat_template(
            [m.as_dict() for m in body.messages], add_generation_prompt=body.add_generation_prompt,
            template=body.chat_template, **(body.chat_template_kwargs or {}),
        )  # fmt: skip
        requests = [self._engine.maker.make(text, params, priority=body.priority, add_special_tokens=False)]

        def common(delta: Delta) -> dict[str, Any]:
            out: dict[str, Any] = {
                "logprobs": chat_logprobs(delta.logprobs, tokenizer) if body.logprobs else None,
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
            }
            if body.return_token_ids:
                out["token_ids"] = delta.token_ids
            return out

        def element(choice: Choice, delta: Delta, first: bool) -> dict[str, Any]:
            message = {"role": "assistant", "content": delta.text} if first else {"content": delta.text}
            return {"index": choice.index, "delta": message, **common(delta)}

        def whole(choice: Choice) -> dict[str, Any]:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return {"index": choice.index, "message": message, **common(_as_delta(choice))}

        extra: dict[str, Any] = {"prompt_token_ids": requests[0].prompt_token_ids} if body.return_token_ids else {}
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = {**self._head("chatcmpl", kind), **extra}
        if body.stream:
            return await self._stream(requests, body, head, element)
        if body.prompt_logprobs is None:
            return await self._unary(requests, http, head, whole)
        return await self._unary(
            requests, http, head, whole, lambda c: {"prompt_logprobs": prompt_logprobs(c[0], tokenizer)}
        )

    def _head(self, prefix: str, kind: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self._model}

    def _check_logprobs(self, name: str, value: int | None) -> None:
        if value is not None and not 0 <= value <= self._max_logprobs:
            raise InvalidRequest(f"{name} must be between 0 and {self._max_logprobs}, not {value}", param=name)

    async def _unary(
        self,
        requests: list[Request],
        http: HttpRequest,
        head: dict[str, Any],
        element: Callable[[Choice], dict[str, Any]],
        extra: Callable[[list[Choice]], dict[str, Any]] = lambda choices: {},
    ) -> Response:
        choices = _choices(requests)

        async def collect() -> None:
            async with aclosing(self._merged(requests)) as news:
                async for at, delta in news:
                    choices[at].extend(delta)

        await _until_disconnected(http, collect())
        body = {
            **head,
            "choices": [element(c) for c in choices],
            "usage": usage(sum(len(r.prompt_token_ids) for r in requests), sum(len(c.token_ids) for c in choices)),
            **extra(choices),
        }
        return Response(orjson.dumps(body), media_type="application/json")

    async def _stream(self, requests: list[Request], body: Sampled, head: dict[str, Any], element: Chunk) -> Response:
        """Errors before the first token are plain HTTP answers; later ones are an event of the stream."""
        news = self._merged(requests)
        try:
            first = await anext(news)
        except BaseException:
            await news.aclose()
            raise
        return StreamingResponse(self._events(first, news, requests, body, head, element), media_type="text/event-stream")

    async def _events(
        self,
        first: tuple[int, Delta],
        news: AsyncIterator[tuple[int, Delta]],
        requests: list[Request],
        body: Sampled,
        head: dict[str, Any],
        element: Chunk,
    ) -> AsyncIterator[bytes]:
        choices = _choices(requests)
        options = body.stream_options
        num_prompt_tokens = sum(len(r.prompt_token_ids) for r in requests)
        seen: set[int] = set()

        def event(at: int, delta: Delta) -> bytes:
            choice = choices[at]
            choice.token_ids += delta.token_ids
            data = {**head, "choices": [element(choice, delta, at not in seen)]}
            seen.add(at)
            if options is not None and options.include_usage:
                total = sum(len(c.token_ids) for c in choices)
                data["usage"] = usage(num_prompt_tokens, total) if options.continuous_usage_stats else None
            return _event(data)

        try:
            yield event(*first)
            async for at, delta in news:
                if delta.text or delta.finish_reason or (delta.token_ids and (delta.logprobs or body.return_token_ids)):
                    yield event(at, delta)
                else:
                    choices[at].token_ids += delta.token_ids  # half a character, or the start of a stop string
            if options is not None and options.include_usage:
                total = sum(len(c.token_ids) for c in choices)
                yield _event({**head, "choices": [], "usage": usage(num_prompt_tokens, total)})
        except DovetailError as e:
            yield _event(error_body(e.message, e.http_status, e.param))
        finally:
            await news.aclose()  # type: ignore[attr-defined]
        yield b"data: [DONE]\n\n"

    async def _merged(self, requests: list[Request]) -> Any:
        """News of all requests as they come: (choice index, delta). Closing it ends them all."""
        if len(requests) == 1:
            async with aclosing(self._metrics.observe(requests[0])) as deltas:
                async for delta in deltas:
                    yield delta.index, delta
            return
        queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()

        async def pump(number: int, request: Request) -> None:
            try:
                async with aclosing(self._metrics.observe(request)) as deltas:
                    async for delta in deltas:
                        queue.put_nowait((number * request.params.n + delta.index, delta))
                queue.put_nowait(None)
            except Exception as e:
                queue.put_nowait(e)

        tasks = [asyncio.create_task(pump(i, r)) for i, r in enumerate(requests)]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _choices(requests: list[Request]) -> list[Choice]:
    return [Choice(i * r.params.n + k, r) for i, r in enumerate(requests) for k in range(r.params.n)]


def _as_delta(c: Choice) -> Delta:
    return Delta(c.index, c.text, c.token_ids, c.logprobs, c.prompt_logprobs, c.finish_reason, c.stop_reason)  # type: ignore[arg-type]


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def _until_disconnected(http: HttpRequest, work: Awaitable[T]) -> T:
    """Do the work, unless the client goes away: then cancel it, so that it stops costing."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else await _cancelled(task)
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()


async def _cancelled(task: asyncio.Future[T]) -> T:
    task.cancel()
    await asyncio.wait({task})
    raise InvalidRequest("the client closed the connection")
