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
    share: float = Field(0.1, gt=0, le=1, description='fraction of the steps to compare')

class EngineConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra='forbid')
    model: str = Field('demo', description="a plugin's model name, a local path or a hub id")
    revision: str | None = Field(None, description='branch, tag or commit of a model on the hub; default: the main branch')
    served_model_name: str | None = Field(None, description='model name in the API; default: `model`')
    device: str = Field('auto', description='auto, cpu, cuda:0, …')
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = Field('auto', description="dtype of weights and activations; auto: the checkpoint's dtype")
    max_model_len: int | None = Field(None, ge=1, description="maximum sequence length; default: the model's context length")
    quantization: QuantizationConfig = Field(QuantizationConfig(), description='extension point: one scheme for the whole model, or rules for some layers; auto: as stored in the checkpoint')
    matmul: ProviderConfig = Field(ProviderConfig(), description='extension point: GEMM with quantized weights, used if there are any')
    architecture: ProviderConfig = Field(ProviderConfig(), description='extension point: model code')
    worker: ProviderConfig = Field(ProviderConfig(), description='extension point: runs the model; `dovetail plugins` lists the providers')
    attention: AttentionConfig = Field(AttentionConfig(), description='extension point: for all layers, or per layer kind')
    kv_cache: ProviderConfig = Field(ProviderConfig(), description='extension point: owns the KV blocks')
    scheduler: ProviderConfig = Field(ProviderConfig(), description='extension point: selects the tokens of each step')
    prefix_cache: ProviderConfig = Field(ProviderConfig(), description='extension point: reuses KV between requests; none: disabled')
    speculation: ProviderConfig = Field(ProviderConfig(use='none'), description='extension point: proposes draft tokens; none: disabled')
    server: ProviderConfig = Field(ProviderConfig(), description='extension point: the server of `dovetail serve`')
    shadow: ShadowConfig | None = Field(None, description='candidates to compare with the selected providers on live traffic: {attention: NAME, quantization: NAME, share: 0.1}')
    overlap: bool | Literal['auto'] = Field('auto', description='schedule the next step while one runs; auto: enabled unless both would share the same cores (cpu)')
    max_num_waiting: int = Field(1024, ge=1, description='maximum number of waiting sequences; more are rejected as overload')
    queue_timeout: float | None = Field(None, gt=0, description='seconds that a request may wait for its first step before it is rejected as overload')
    request_timeout: float | None = Field(None, gt=0, description='seconds that a request may take in total before it is ended')
    stall_timeout: float = Field(60, ge=1, description='seconds after which a step counts as stalled, or five times its predicted time if that is longer')
    heartbeat_timeout: float = Field(2, ge=0.5, description='seconds without a heartbeat after which the process is replaced')
    load_timeout: float = Field(600, ge=1, description='seconds without progress after which loading counts as stalled')
    trust_remote_code: bool = Field(False, description='run code from the model folder')

def load_config(file: str | os.PathLike[str] | None=None, env: dict[str, str] | None=None, **values: Any) -> EngineConfig:
    ...

def read_file(path: Path) -> dict[str, Any]:
    ...

def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    ...
