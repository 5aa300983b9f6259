"""Define the request bodies of the OpenAI API. Unknown fields are ignored, and null means
absent."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dovetail.errors import InvalidRequest
from dovetail.types import SamplingParams

T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list whose validation stops at the first invalid item: a body with a million invalid items must
not produce a million errors."""

UNSUPPORTED = (
    "allowed_token_ids",
    "bad_words",
    "continue_final_message",
    "documents",
    "functions",
    "function_call",
    "grammar",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "json_schema",
    "logits_processors",
    "modalities",
    "regex",
    "ebnf",
    "response_format",
    "structured_outputs",
    "tool_choice",
    "tools",
    "truncate_prompt_tokens",
    "use_beam_search",
)
"""Fields that are not implemented and cannot be ignored, because they constrain the output. A
request that sets one is rejected; null means absent."""
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "continue_final_message": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "use_beam_search": (False,),
}
"""Values of unsupported fields that are accepted because they request nothing."""


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(Body):
    """Fields of both completion routes: OpenAI's parameters and vLLM's additional ones."""

    @model_validator(mode="before")
    @classmethod
    def _reject_unsupported(cls, data: Any) -> Any:
        """Reject unsupported fields. This runs before validation, because unknown fields are not
        kept: a stream would hold them in memory until it ends."""
        if isinstance(data, dict):
            for name in UNSUPPORTED:
                value = data.get(name)
                if value is not None and value not in NO_EFFECT.get(name, ()):
                    raise InvalidRequest(f"{name}: not supported by this server", param=name)
        return data

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | Many[str] | None = None
    stop_token_ids: Many[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = None
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    user: str | None = None

    def check(self) -> None:
        """Check conditions that involve several fields. Raises `InvalidRequest`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options requires stream to be true", param="stream_options"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")

    def sampling(
        self, defaults: dict[str, Any], *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """Return the sampling parameters. Values of the request take precedence over those of the
        model's generation config, and these over the defaults. Raises `InvalidRequest`.

        Fields that also exist in `SamplingParams` are passed on under the same name.
        """
        shared = self.model_fields_set.intersection(SamplingParams.__struct_fields__)
        values = {name: value for name in shared if (value := getattr(self, name)) is not None}
        values["logit_bias"] = _token_biases(self.logit_bias or {})
        return SamplingParams(
            **{**defaults, **values, "max_tokens": max_tokens, "logprobs": logprobs}
        )


class CompletionRequest(SamplingBody):
    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    echo: bool = False
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise InvalidRequest(
                "suffix is not supported: this model has no fill-in-the-middle", param="suffix"
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("best_of must equal n", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "max_tokens must be at least 1, or 0 with echo", param="max_tokens"
            )

    def prompts(self) -> list[str | list[int]]:
        """Return a list with one entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class Message(Body):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Many[dict[str, Any]] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates expect it, with content parts joined. Raises
        `InvalidRequest` for parts that are not text."""
        data = {
            "role": self.role,
            **{k: v for k, v in (self.model_extra or {}).items() if v is not None},
        }
        if self.content is None and self.role != "assistant":
            raise InvalidRequest(f"a message of role {self.role} needs content", param="messages")
        if isinstance(self.content, str):
            data["content"] = self.content
        elif self.content is not None:
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise InvalidRequest(
                        f"content part of type {part.get('type')!r}: only text is supported",
                        param="messages",
                    )
            data["content"] = "".join(part["text"] for part in self.content)
        return data


class ChatRequest(SamplingBody):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """`max_completion_tokens`, or `max_tokens` if it is not set."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs requires logprobs to be true", param="top_logprobs")
        if self.limit == 0:
            raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Many[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Many[int]


def _token_biases(values: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in values.items()}
    except ValueError:
        raise InvalidRequest("logit_bias: keys must be token ids", param="logit_bias") from None
