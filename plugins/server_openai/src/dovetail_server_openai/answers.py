"""From deltas to the JSON of the two completion routes: choices, log-probabilities, usage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from dovetail.frontend.outputs import Delta
from dovetail.frontend.tokenizer import REPLACEMENT, Tokenizer
from dovetail.types import Request, TokenLogprobs
from dovetail_server_openai.protocol import ChatRequest, CompletionRequest

FLOOR = -9999.0
"""JSON has no minus infinity."""


@dataclass
class Choice:
    """One sample of one prompt, on its way to the client."""

    index: int
    request: Request
    held: Delta | None = None
    """Output that no chunk has sent yet: half a character, the possible beginning of a stop string,
    a prompt's log-probabilities."""
    opened: bool = False
    """The client has been told of it."""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    """Of its prompt."""

    def take(self, delta: Delta) -> Delta:
        """Everything that has not been told, this delta included."""
        self.num_tokens += len(delta.token_ids)
        self.num_cached_tokens = delta.num_cached_tokens
        if self.held is None:
            self.held = delta
        else:
            self.held.extend(delta)
        return self.held


class Answer(Protocol):
    """One route's JSON."""

    kind: str
    prefix: str
    """Of ids."""

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The element of a choice's first chunk, where the route wants one of its own."""

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """The element of a chunk. A whole completion is a chunk that holds everything."""

    def whole(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """The element of an answer that is not streamed."""

    def extra(self, choices: list[Choice]) -> dict[str, Any]:
        """Beside `choices`, once an answer: in its first chunk, where it is streamed."""


class CompletionAnswer:
    """/v1/completions."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(
        self, body: CompletionRequest, tokenizer: Tokenizer, echoed: list[str], n: int
    ) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._echoed = echoed
        self._n = n
        self._logprobs = [CompletionLogprobs(tokenizer) for _ in range(len(echoed) * n)]

    def opening(self, choice: Choice) -> None:
        return None

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        body, first = self._body, not choice.opened
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
            out["logprobs"] = self._logprobs[choice.index].take(positions)
        if body.return_token_ids:
            out["token_ids"] = delta.token_ids
            if first:
                out["prompt_token_ids"] = choice.request.prompt_token_ids
        if body.prompt_logprobs is not None:
            out["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, self._tokenizer)
        return out

    whole = part

    def extra(self, choices: list[Choice]) -> dict[str, Any]:
        return {}


class ChatAnswer:
    """/v1/chat/completions."""

    prefix = "chatcmpl"

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer) -> None:
        self.kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._body = body
        self._tokenizer = tokenizer

    def opening(self, choice: Choice) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return {"index": choice.index, "delta": {"content": delta.text}, **self._common(delta)}

    def whole(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": choice.index, "message": message, **self._common(delta)}

    def extra(self, choices: list[Choice]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if self._body.return_token_ids:
            out["prompt_token_ids"] = choices[0].request.prompt_token_ids
        if self._body.prompt_logprobs is not None and choices[0].held is not None:
            out["prompt_logprobs"] = prompt_logprobs(
                choices[0].held.prompt_logprobs, self._tokenizer
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
    """A prompt counts once, however many samples it has, and is cached as far as its first sample
    found it."""
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
    """`choices[].logprobs` of the chat route: one entry a generated token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        # A token that is a part of a character has bytes that its text does not tell.
        data = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, FLOOR), "bytes": data}

    content = []
    for p in positions:
        pairs = list(zip(p.token_ids, p.logprobs, strict=True))
        content.append({**entry(*pairs[0]), "top_logprobs": [entry(*pair) for pair in pairs[1:]]})
    return {"content": content}


class CompletionLogprobs:
    """`choices[].logprobs` of the completions route. Keeps the text offset, so that chunks of a
    stream continue it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def take(self, positions: list[TokenLogprobs | int]) -> dict[str, Any]:
        """`positions`: log-probabilities, or a bare token id where there are none (the first prompt
        token)."""
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
            # The chosen token stands beside the most likely ones; of two tokens with one text the
            # likelier counts.
            top: dict[str, float] = {}
            for i, v in sorted(zip(p.token_ids, values, strict=True), key=lambda pair: -pair[1]):
                top.setdefault(self._tokenizer.token_text(i), v)
            out["top_logprobs"].append(top)
        return out


def prompt_logprobs(
    positions: list[TokenLogprobs], tokenizer: Tokenizer
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: null for the first token, then {token_id: {logprob, rank,
    decoded_token}}."""
    out: list[dict[str, Any] | None] = [None]
    for p in positions:
        # The first entry is the prompt's own token with its rank; the others are the best, in
        # order.
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
