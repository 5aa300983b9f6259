"""The request bodies of the OpenAI API, as far as they mean something here. Unknown fields are
ignored, null is absent."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dovetail.errors import InvalidRequest
from dovetail.types import SamplingParams

T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first bad item is the error: a body of a million bad items is not a million
errors."""

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
"""Known, not built yet, and not to be ignored: they say what the answer must be. None means
absent."""
HARMLESS: dict[str, tuple[Any, ...]] = {
    "continue_final_message": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "use_beam_search": (False,),
}
"""Values of these that ask for nothing."""


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampled(Body):
    """What both completion routes share: OpenAI's parameters and vLLM's extra ones."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        """Before fields are read, because unknown ones are not kept: a stream would hold them as
        long as it lasts."""
        if isinstance(data, dict):
            for name in UNSUPPORTED:
                value = data.get(name)
                if value is not None and value not in HARMLESS.get(name, ()):
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
        """Raise `InvalidRequest` for what is no range of one field."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options is for streams: set stream to true", param="stream_options"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")

    def sampling(
        self, defaults: dict[str, Any], *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """Request over the model's generation config over the defaults. Raises `InvalidRequest`.

        A field of `SamplingParams` that a body has too is passed on under its name.
        """
        shared = self.model_fields_set.intersection(SamplingParams.__struct_fields__)
        given = {name: value for name in shared if (value := getattr(self, name)) is not None}
        given["logit_bias"] = _token_biases(self.logit_bias or {})
        return SamplingParams(
            **{**defaults, **given, "max_tokens": max_tokens, "logprobs": logprobs}
        )


class CompletionRequest(Sampled):
    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    echo: bool = False
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise InvalidRequest("suffix: this model does not fill in the middle", param="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("best_of is not supported: use n", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens is at least 1, or 0 with echo", param="max_tokens")

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
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
        """As chat templates want it: content parts joined. Raises `InvalidRequest` for parts that
        are no text."""
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
                        f"content part of type {part.get('type')!r}: this model reads text",
                        param="messages",
                    )
            data["content"] = "".join(part["text"] for part in self.content)
        return data


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """`max_completion_tokens` wins over its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        if self.limit == 0:
            raise InvalidRequest("max_tokens is at least 1", param="max_tokens")


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


def _token_biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise InvalidRequest("logit_bias: keys are token ids", param="logit_bias") from None
