from __future__ import annotations
import os
import tomllib
from pathlib import Path
from typing import Any, Literal
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from dovetail.errors import ConfigError
ENV_PREFIX = 'DOVETAIL_'

class ProviderConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra='forbid')
    use: str = 'auto'
    on_unsupported: Literal['error', 'fallback'] = 'error'
    options: dict[str, Any] = {}

class AttentionConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra='forbid')
    default: ProviderConfig = ProviderConfig()
    by_kind: dict[str, ProviderConfig] = {}

    def of(self, kind: str) -> ProviderConfig:
        ...

class QuantizationRule(ProviderConfig):
    match: str = '*'

class QuantizationConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra='forbid')
    rules: tuple[QuantizationRule, ...] = (QuantizationRule(),)

class ShadowConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra='forbid')
    attention: AttentionConfig | None = None
    quantization: ProviderConfig | None = None
    share: float = Field(0.1, gt=0, le=1, description='of the steps that are compared')

class EngineConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra='forbid')
    model: str = Field('demo', description="a plugin's model name, a local folder, or a hub id")
    revision: str | None = Field(None, description='branch, tag or commit of a model on the hub; default: its main branch')
    served_model_name: str | None = Field(None, description='the name clients use; default: `model`')
    device: str = Field('auto', description='auto, cpu, cuda:0, …')
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = Field('auto', description="auto is the checkpoint's")
    max_model_len: int | None = Field(None, ge=1, description="longest sequence; default: the model's context")
    quantization: QuantizationConfig = Field(QuantizationConfig(), description='an extension point: for the whole model, or rules for some layers; auto: as the checkpoint is')
    matmul: ProviderConfig = Field(ProviderConfig(), description='an extension point: products by quantized weights, if there are any')
    architecture: ProviderConfig = Field(ProviderConfig(), description='an extension point: model code')
    worker: ProviderConfig = Field(ProviderConfig(), description='an extension point: what computes: see `dovetail plugins`')
    attention: AttentionConfig = Field(AttentionConfig(), description='an extension point: for all layers, or by kind')
    kv_cache: ProviderConfig = Field(ProviderConfig(), description='an extension point: owner of the KV blocks')
    scheduler: ProviderConfig = Field(ProviderConfig(), description='an extension point: what runs next')
    prefix_cache: ProviderConfig = Field(ProviderConfig(), description='an extension point: reuse between requests; none: without')
    speculation: ProviderConfig = Field(ProviderConfig(use='none'), description='an extension point: drafts tokens ahead; none: without')
    server: ProviderConfig = Field(ProviderConfig(), description='an extension point: for `dovetail serve`')
    shadow: ShadowConfig | None = Field(None, description='candidates to compare on live traffic: {attention: NAME, quantization: NAME, share: 0.1}')
    overlap: bool | Literal['auto'] = Field('auto', description='schedule the next step while one runs; auto: unless both would share the same cores (cpu)')
    max_num_waiting: int = Field(1024, ge=1, description='sequences that may wait; more are refused as overload')
    queue_timeout: float | None = Field(None, gt=0, description='seconds that a request may wait for its first step; then it is refused as overload')
    request_timeout: float | None = Field(None, gt=0, description='seconds that a request may take in all; then it is ended')
    stall_timeout: float = Field(60, ge=1, description='seconds after which a step counts as stalled, unless five times its predicted time is more')
    heartbeat_timeout: float = Field(2, ge=0.5, description='seconds of silence after which an engine process is replaced')
    load_timeout: float = Field(600, ge=1, description='seconds without progress after which loading counts as stalled')
    trust_remote_code: bool = Field(False, description='run code that comes with a checkpoint')

def load_config(file: str | os.PathLike[str] | None=None, env: dict[str, str] | None=None, **values: Any) -> EngineConfig:
    ...

def read_file(path: Path) -> dict[str, Any]:
    ...

def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    ...
