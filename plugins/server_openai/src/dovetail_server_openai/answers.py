"""From deltas to the JSON of the two completion routes: choices, log-probabilities, usage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dovetail.frontend.outputs import Delta
from dovetail.frontend.tokenizer import Tokenizer
from dovetail.types import Request, TokenLogprobs

FLOOR = -9999.0
"""JSON has no minus infinity."""


@dataclass
class Choice:
    """One sample of one prompt, as it grows."""

    index: int
    request: Request
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def extend(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


def usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def chat_logprobs(positions: list[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of the chat route: one entry a generated token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        return {"token": text, "logprob": max(logprob, FLOOR), "bytes": list(text.encode())}

    content = []
    for p in positions:
        pairs = list(zip(p.token_ids, p.logprobs, strict=True))
        content.append({**entry(*pairs[0]), "top_logprobs": [entry(*pair) for pair in pairs[1:]]})
    return {"content": content}


class CompletionLogprobs:
    """`choices[].logprobs` of the completions route. Keeps the text offset, so that chunks of a stream continue it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def take(self, positions: list[TokenLogprobs | int]) -> dict[str, Any]:
        """`positions`: log-probabilities, or a bare token id where there are none (the first prompt token)."""
        out: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
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
            # The chosen token stands beside the most likely ones; of two tokens with one text the likelier counts.
            top: dict[str, float] = {}
            for i, v in sorted(zip(p.token_ids, values, strict=True), key=lambda pair: -pair[1]):
                top.setdefault(self._tokenizer.token_text(i), v)
            out["top_logprobs"].append(top)
        return out


def prompt_logprobs(choice: Choice, tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: null for the first token, then {token_id: {logprob, rank, decoded_token}}."""
    out: list[dict[str, Any] | None] = [None]
    for p in choice.prompt_logprobs:
        # The first entry is the prompt's own token with its rank; the others are the best, in order.
        entries = {
            str(i): {"logprob": max(v, FLOOR), "rank": rank, "decoded_token": tokenizer.token_text(i)}
            for rank, (i, v) in enumerate(zip(p.token_ids[1:], p.logprobs[1:], strict=True), 1)
        }
        own, logprob = p.token_ids[0], max(p.logprobs[0], FLOOR)
        entries[str(own)] = {"logprob": logprob, "rank": p.rank, "decoded_token": tokenizer.token_text(own)}
        out.append(entries)
    return out
