"""Convert deltas to the JSON of the two completion routes: choices, log-probabilities, usage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from dovetail.frontend.outputs import Delta
from dovetail.frontend.tokenizer import REPLACEMENT, Tokenizer
from dovetail.types import Request, TokenLogprobs
from dovetail_server_openai.protocol import ChatRequest, CompletionRequest

FLOOR = -9999.0
"""Replaces minus infinity, which JSON cannot represent."""


@dataclass
class Choice:
    """One sample of one prompt, and what has been sent of it."""

    index: int
    request: Request
    pending: Delta | None = None
    """Output that no chunk has contained yet: half a character, the possible beginning of a stop
    string, a prompt's log-probabilities."""
    started: bool = False
    """True once a chunk of this choice has been sent."""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    """Number of prompt tokens that were found in the prefix cache."""

    def add(self, delta: Delta) -> Delta:
        """Add a delta and return all pending output, this delta included."""
        self.num_tokens += len(delta.token_ids)
        self.num_cached_tokens = delta.num_cached_tokens
        if self.pending is None:
            self.pending = delta
        else:
            self.pending.extend(delta)
        return self.pending


class Answer(Protocol):
    """Builds the JSON of one route."""

    kind: str
    prefix: str
    """Prefix of response ids."""

    def first_chunk(self, choice: Choice) -> dict[str, Any] | None:
        """Return the element of `choices` for the extra first chunk of a choice, or None if the
        route has no such chunk."""

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """Return the element of `choices` for a chunk of a stream."""

    def full(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """Return the element of `choices` for a response that is not streamed."""

    def extra(self, choices: list[Choice]) -> dict[str, Any]:
        """Return top-level fields of the response. A stream has them in its first chunk only."""


class CompletionAnswer:
    """Builds the JSON of /v1/completions."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(
        self, body: CompletionRequest, tokenizer: Tokenizer, echoed: list[str], n: int
    ) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._echoed = echoed
        self._n = n
        self._logprobs = [CompletionLogprobs(tokenizer) for _ in range(len(echoed) * n)]

    def first_chunk(self, choice: Choice) -> None:
        return None

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        body, first = self._body, not choice.started
        out: dict[str, Any] = {
            "index": choice.index,
            "text": self._echoed[choice.index // self._n] + delta.text if first else delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.logprobs is not None:
            positions: list[TokenLogprobs | int] = list(delta.logprobs)
            if first and body.echo:
                positions = [choice.request.prompt_token_ids[0], *delta.prompt_logprobs, *positions]
            out["logprobs"] = self._logprobs[choice.index].add(positions)
        if body.return_token_ids:
            out["token_ids"] = delta.token_ids
            if first:
                out["prompt_token_ids"] = choice.request.prompt_token_ids
        if body.prompt_logprobs is not None:
            out["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, self._tokenizer)
        return out

    full = chunk

    def extra(self, choices: list[Choice]) -> dict[str, Any]:
        return {}


class ChatAnswer:
    """Builds the JSON of /v1/chat/completions."""

    prefix = "chatcmpl"

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer) -> None:
        self.kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._body = body
        self._tokenizer = tokenizer

    def first_chunk(self, choice: Choice) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return {"index": choice.index, "delta": {"content": delta.text}, **self._common(delta)}

    def full(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": choice.index, "message": message, **self._common(delta)}

    def extra(self, choices: list[Choice]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if self._body.return_token_ids:
            out["prompt_token_ids"] = choices[0].request.prompt_token_ids
        if self._body.prompt_logprobs is not None and choices[0].pending is not None:
            out["prompt_logprobs"] = prompt_logprobs(
                choices[0].pending.prompt_logprobs, self._tokenizer
            )
        return out

    def _common(self, delta: Delta) -> dict[str, Any]:
        out: dict[str, Any] = {
            "logprobs": (
                chat_logprobs(delta.logprobs, self._tokenizer) if self._body.logprobs else None
            ),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            out["token_ids"] = delta.token_ids
        return out


def usage(choices: list[Choice]) -> dict[str, Any]:
    """Return `usage`. Each prompt counts once, whatever its number of samples; `cached_tokens` is
    the number of tokens that its first sample found in the prefix cache."""
    firsts = {id(c.request): c for c in reversed(choices)}.values()
    num_prompt_tokens = sum(len(c.request.prompt_token_ids) for c in firsts)
    num_tokens = sum(c.num_tokens for c in choices)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(c.num_cached_tokens for c in firsts)},
    }


def chat_logprobs(positions: list[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return `choices[].logprobs` of the chat route, with one entry per generated token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        # The text of a token that is part of a character does not determine its bytes.
        data = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, FLOOR), "bytes": data}

    content = []
    for p in positions:
        pairs = list(zip(p.token_ids, p.logprobs, strict=True))
        content.append({**entry(*pairs[0]), "top_logprobs": [entry(*pair) for pair in pairs[1:]]})
    return {"content": content}


class CompletionLogprobs:
    """Builds `choices[].logprobs` of the completions route. One object per choice keeps the text
    offset from one chunk of a stream to the next."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def add(self, positions: list[TokenLogprobs | int]) -> dict[str, Any]:
        """Return the log-probabilities of `positions`. An int is a token id without
        log-probabilities (the first prompt token)."""
        out: dict[str, Any] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for p in positions:
            token_id = p if isinstance(p, int) else p.token_ids[0]
            text = self._tokenizer.token_text(token_id)
            out["text_offset"].append(self._offset)
            out["tokens"].append(text)
            self._offset += len(text)
            if isinstance(p, int):
                out["token_logprobs"].append(None)
                out["top_logprobs"].append(None)
                continue
            values = [max(v, FLOOR) for v in p.logprobs]
            out["token_logprobs"].append(values[0])
            # The sampled token is listed in addition to the most likely ones. If two tokens have
            # the same text, the more likely one is kept.
            top: dict[str, float] = {}
            for i, v in sorted(zip(p.token_ids, values, strict=True), key=lambda pair: -pair[1]):
                top.setdefault(self._tokenizer.token_text(i), v)
            out["top_logprobs"].append(top)
        return out


def prompt_logprobs(
    positions: list[TokenLogprobs], tokenizer: Tokenizer
) -> list[dict[str, Any] | None]:
    """Return `prompt_logprobs` in vLLM's format: null for the first token, then {token_id:
    {logprob, rank, decoded_token}}."""
    out: list[dict[str, Any] | None] = [None]
    for p in positions:
        # The first entry is the prompt token with its rank. The others are the most likely tokens,
        # in order.
        entries = {
            str(i): {
                "logprob": max(v, FLOOR),
                "rank": rank,
                "decoded_token": tokenizer.token_text(i),
            }
            for rank, (i, v) in enumerate(zip(p.token_ids[1:], p.logprobs[1:], strict=True), 1)
        }
        own, logprob = p.token_ids[0], max(p.logprobs[0], FLOOR)
        entries[str(own)] = {
            "logprob": logprob,
            "rank": p.rank,
            "decoded_token": tokenizer.token_text(own),
        }
        out.append(entries)
    return out
