from __future__ import annotations
from typing import ClassVar

class DovetailError(Exception):
    code: ClassVar[str] = 'internal_error'
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None=None, provider: str | None=None, retry_after: float | None=None) -> None:
        ...

class InvalidRequest(DovetailError):
    code = 'invalid_request'
    http_status = 400

class ModelNotFound(DovetailError):
    code = 'model_not_found'
    http_status = 404

class Overloaded(DovetailError):
    code = 'overloaded'
    http_status = 429
    retryable = True

class EngineUnavailable(DovetailError):
    code = 'engine_unavailable'
    http_status = 503
    retryable = True

class EngineDead(EngineUnavailable):
    code = 'engine_dead'

class DeadlineExceeded(DovetailError):
    code = 'deadline_exceeded'
    http_status = 504

class StepFailed(DovetailError):
    code = 'step_failed'
    retryable = True

class ConfigError(DovetailError):
    code = 'config_error'

class PluginError(DovetailError):
    code = 'plugin_error'

class CheckpointError(DovetailError):
    code = 'checkpoint_error'

class OutOfMemory(DovetailError):
    code = 'out_of_memory'
ERRORS: dict[str, type[DovetailError]] = {cls.code: cls for cls in (DovetailError, InvalidRequest, ModelNotFound, Overloaded, EngineUnavailable, EngineDead, DeadlineExceeded, StepFailed, ConfigError, PluginError, CheckpointError, OutOfMemory)}
