"""The configuration of an engine: one frozen model, for files, command line and code alike."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dovetail.errors import ConfigError

ENV_PREFIX = "DOVETAIL_"


class ProviderConfig(BaseModel):
    """`NAME`, or `{use: NAME, on_unsupported: error|fallback, …options of the provider}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    use: str = "auto"
    on_unsupported: Literal["error", "fallback"] = "error"
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"use": value}
        if isinstance(value, dict) and "options" not in value:
            own = {k: v for k, v in value.items() if k in ("use", "on_unsupported")}
            return {**own, "options": {k: v for k, v in value.items() if k not in own}}
        return value


class AttentionConfig(BaseModel):
    """One extension point for all layers, or one for each kind of layer: `{full: NAME, sliding:
    {use: NAME, …}}`; `draft` are those of a draft model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: ProviderConfig = ProviderConfig()
    by_kind: dict[str, ProviderConfig] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        if isinstance(value, dict) and ("default" in value or "by_kind" in value):
            return value
        if isinstance(value, dict) and value and set(value) <= {"full", "sliding", "draft"}:
            return {"by_kind": value}
        return {"default": value}

    def of(self, kind: str) -> ProviderConfig:
        return self.by_kind.get(kind, self.default)


class QuantizationRule(ProviderConfig):
    """What the layers are quantized with whose names in the checkpoint match a glob."""

    match: str = "*"

    @model_validator(mode="before")
    @classmethod
    def _apart_from_options(cls, value: Any) -> Any:
        if isinstance(value, dict) and "match" in value and "options" not in value:
            rest = {k: v for k, v in value.items() if k != "match"}
            return {"match": value["match"], **ProviderConfig.model_validate(rest).model_dump()}
        return value


class QuantizationConfig(BaseModel):
    """One scheme for the whole model, or rules, of which the first that matches a layer counts:
    `[{match: GLOB, use: NAME}]`.

    Layers that no rule matches are as the checkpoint has them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[QuantizationRule, ...] = (QuantizationRule(),)

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        if isinstance(value, dict) and "rules" in value:
            return value
        return {"rules": value if isinstance(value, list | tuple) else [value]}


class ShadowConfig(BaseModel):
    """Candidates that compute a share of the steps a second time, beside the providers that answer:
    what they give is compared, timed, and dropped. `{attention: NAME, quantization: NAME, share:
    0.1}`; either may be left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: AttentionConfig | None = None
    quantization: ProviderConfig | None = None
    share: float = Field(0.1, gt=0, le=1, description="of the steps that are compared")

    @model_validator(mode="after")
    def _of_something(self) -> ShadowConfig:
        if self.attention is None and self.quantization is None:
            raise ValueError("names no candidate: give attention, quantization or both")
        return self


class EngineConfig(BaseModel):
    """Precedence: code and command line over environment (DOVETAIL_…) over file over these
    defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("demo", description="a plugin's model name, a local folder, or a hub id")
    revision: str | None = Field(
        None, description="branch, tag or commit of a model on the hub; default: its main branch"
    )
    served_model_name: str | None = Field(
        None, description="the name clients use; default: `model`"
    )
    device: str = Field("auto", description="auto, cpu, cuda:0, …")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto is the checkpoint's"
    )
    max_model_len: int | None = Field(
        None, ge=1, description="longest sequence; default: the model's context"
    )
    quantization: QuantizationConfig = Field(
        QuantizationConfig(),
        description=(
            "an extension point: for the whole model, or rules for some layers; auto: as the"
            " checkpoint is"
        ),
    )
    matmul: ProviderConfig = Field(
        ProviderConfig(),
        description="an extension point: products by quantized weights, if there are any",
    )
    architecture: ProviderConfig = Field(
        ProviderConfig(), description="an extension point: model code"
    )
    worker: ProviderConfig = Field(
        ProviderConfig(), description="an extension point: what computes: see `dovetail plugins`"
    )
    attention: AttentionConfig = Field(
        AttentionConfig(), description="an extension point: for all layers, or by kind"
    )
    kv_cache: ProviderConfig = Field(
        ProviderConfig(), description="an extension point: owner of the KV blocks"
    )
    scheduler: ProviderConfig = Field(
        ProviderConfig(), description="an extension point: what runs next"
    )
    prefix_cache: ProviderConfig = Field(
        ProviderConfig(), description="an extension point: reuse between requests; none: without"
    )
    speculation: ProviderConfig = Field(
        ProviderConfig(use="none"),
        description="an extension point: drafts tokens ahead; none: without",
    )
    server: ProviderConfig = Field(
        ProviderConfig(), description="an extension point: for `dovetail serve`"
    )
    shadow: ShadowConfig | None = Field(
        None,
        description=(
            "candidates to compare on live traffic: {attention: NAME, quantization: NAME, share:"
            " 0.1}"
        ),
    )
    overlap: bool | Literal["auto"] = Field(
        "auto",
        description=(
            "schedule the next step while one runs; auto: unless both would share the same cores"
            " (cpu)"
        ),
    )
    max_num_waiting: int = Field(
        1024, ge=1, description="sequences that may wait; more are refused as overload"
    )
    queue_timeout: float | None = Field(
        None,
        gt=0,
        description=(
            "seconds that a request may wait for its first step; then it is refused as overload"
        ),
    )
    request_timeout: float | None = Field(
        None, gt=0, description="seconds that a request may take in all; then it is ended"
    )
    stall_timeout: float = Field(
        60,
        ge=1,
        description=(
            "seconds after which a step counts as stalled, unless five times its predicted time is"
            " more"
        ),
    )
    heartbeat_timeout: float = Field(
        2, ge=0.5, description="seconds of silence after which an engine process is replaced"
    )
    load_timeout: float = Field(
        600, ge=1, description="seconds without progress after which loading counts as stalled"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with a checkpoint")

    @field_validator("model")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty: give a model name, a folder or a hub id")
        return value


def load_config(
    file: str | os.PathLike[str] | None = None, env: dict[str, str] | None = None, **values: Any
) -> EngineConfig:
    """Merge file, environment and `values` (highest). Raises `ConfigError` with the field's path
    and its origin."""
    data: dict[str, Any] = {}
    if file is not None:
        data = read_file(Path(file))
    for key, text in (os.environ if env is None else env).items():
        name = key.removeprefix(ENV_PREFIX).lower()
        if key.startswith(ENV_PREFIX) and name in EngineConfig.model_fields:
            import yaml

            data = merge(data, {name: yaml.safe_load(text)})
    data = merge(data, {k: v for k, v in values.items() if v is not None})
    try:
        return EngineConfig.model_validate(data)
    except ValidationError as e:
        origin = f"{file}: " if file is not None else ""
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in e.errors())
        raise ConfigError(
            f"{origin}{problems}. Keys: {', '.join(EngineConfig.model_fields)}"
        ) from None


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML or TOML mapping."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from None
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: {e}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(data).__name__}")
    return data


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` over `low`; options of one extension point are merged, unless `high` names another
    provider."""
    out = dict(low)
    for key, value in high.items():
        old = out.get(key)
        if isinstance(old, str) and isinstance(value, dict):
            old = {"use": old}
        if isinstance(old, dict) and isinstance(value, str):
            value = {"use": value}
        if isinstance(old, dict) and isinstance(value, dict):
            same = old.get("use") in (None, value.get("use", old.get("use")))
            out[key] = {**old, **value} if same else value
        else:
            out[key] = value
    return out
