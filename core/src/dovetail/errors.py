"""Define the errors that Dovetail raises on purpose.

Each error has a stable `code`, the HTTP status that the server answers with, whether a retry can
help, and the provider concerned, if there is one. The message says what was wrong, where, and what
to do.
"""

from __future__ import annotations

from typing import ClassVar


class DovetailError(Exception):
    """Base of all errors below."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        provider: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.provider = provider
        self.retry_after = retry_after
        """Seconds after which a retry may help, if known."""


class InvalidRequest(DovetailError):
    """A request that can never succeed unchanged. `param` names the field."""

    code = "invalid_request"
    http_status = 400


class ModelNotFound(DovetailError):
    """The request names a model that this engine does not serve."""

    code = "model_not_found"
    http_status = 404


class Overloaded(DovetailError):
    """A bounded queue is full, or the engine is draining. Nothing was queued; retry later."""

    code = "overloaded"
    http_status = 429
    retryable = True


class EngineUnavailable(DovetailError):
    """The engine is loading, restarting, draining or closed."""

    code = "engine_unavailable"
    http_status = 503
    retryable = True


class EngineDead(EngineUnavailable):
    """The engine process died or stalled while the request was in flight. The output sent so far is
    all there is."""

    code = "engine_dead"


class DeadlineExceeded(DovetailError):
    """The request ran longer than the server allows (`request_timeout`). The output sent so far is
    all there is."""

    code = "deadline_exceeded"
    http_status = 504


class StepFailed(DovetailError):
    """A step-scoped component (worker, attention, quantization, scheduler) raised an exception, and
    the requests of the step failed with it."""

    code = "step_failed"
    retryable = True


class ConfigError(DovetailError):
    """The configuration cannot be used. The message contains the path of the field."""

    code = "config_error"


class PluginError(DovetailError):
    """A plugin is broken, missing, or cannot do what was requested. The message names the
    distribution."""

    code = "plugin_error"


class CheckpointError(DovetailError):
    """Files of a model are missing, malformed, or do not match its config. The message names the
    file."""

    code = "checkpoint_error"


class OutOfMemory(DovetailError):
    """The model or its KV cache does not fit in memory. The message says which setting to lower,
    and to what value."""

    code = "out_of_memory"


ERRORS: dict[str, type[DovetailError]] = {
    cls.code: cls
    for cls in (
        DovetailError,
        InvalidRequest,
        ModelNotFound,
        Overloaded,
        EngineUnavailable,
        EngineDead,
        DeadlineExceeded,
        StepFailed,
        ConfigError,
        PluginError,
        CheckpointError,
        OutOfMemory,
    )
}
"""Error classes by code: an error is sent between processes as its code and message."""
