"""What an operator sets of the server."""

from __future__ import annotations

from pydantic import Field, SecretStr

from dovetail.plugin.provider import Options


class ServerOptions(Options):
    api_key: SecretStr | None = Field(None, description="clients must send it as a bearer token")
    api_key_file: str | None = Field(
        None, description="a file of such keys, one a line; each has a prefix cache of its own"
    )
    open_metrics: bool = Field(False, description="answer /metrics without a key")
    max_body_mb: float = Field(32, gt=0, description="largest request body, MiB")
    head_timeout: float = Field(
        10, gt=0, description="seconds for a client to send a request's head"
    )
    body_timeout: float = Field(
        60, gt=0, description="seconds for a client to send a request's body"
    )
    max_logprobs: int = Field(
        20, ge=0, le=64, description="most alternatives a token that a request may ask for"
    )
    max_answer_logprobs: int = Field(
        300_000, ge=1, description="most log-probabilities of all tokens of a request"
    )
    drain_seconds: float = Field(
        30, ge=0, description="how long SIGTERM waits for requests in flight"
    )
    allow_chat_template: bool = Field(
        False, description="take chat templates from requests; one can loop for minutes"
    )
    metrics_prefix: str = Field(
        "dovetail:", description="of the Prometheus names; vllm: fits dashboards made for vLLM"
    )
