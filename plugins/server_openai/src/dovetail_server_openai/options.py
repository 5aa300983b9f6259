"""Define the options of the server."""

from __future__ import annotations

from pydantic import Field, SecretStr

from dovetail.plugin.provider import Options


class ServerOptions(Options):
    api_key: SecretStr | None = Field(
        None, description="API key that clients must send as a bearer token"
    )
    api_key_file: str | None = Field(
        None,
        description="file with one API key per line; each key has its own prefix cache",
    )
    open_metrics: bool = Field(False, description="serve /metrics without an API key")
    max_body_mb: float = Field(32, gt=0, description="maximum size of a request body in MiB")
    head_timeout: float = Field(
        10, gt=0, description="seconds within which a client must send a request's head"
    )
    body_timeout: float = Field(
        60, gt=0, description="seconds within which a client must send a request's body"
    )
    max_logprobs: int = Field(
        20,
        ge=0,
        le=64,
        description="maximum logprobs, top_logprobs and prompt_logprobs of a request",
    )
    max_answer_logprobs: int = Field(
        300_000, ge=1, description="maximum number of log-probabilities in one response"
    )
    drain_seconds: float = Field(
        30, ge=0, description="seconds that in-flight requests may take to finish after SIGTERM"
    )
    allow_chat_template: bool = Field(
        False, description="accept chat templates from requests; a template can loop for minutes"
    )
    metrics_prefix: str = Field(
        "dovetail:", description="prefix of Prometheus metric names; use vllm: for vLLM dashboards"
    )
