"""Define the engine config: one frozen model for files, the command line and code."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dovetail.errors import ConfigError

ENV_PREFIX = "DOVETAIL_"


class ProviderConfig(BaseModel):
    """A requested provider: `NAME`, or `{use: NAME, on_unsupported: error|fallback, …options of the
    provider}`."""

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
    """One provider for all layers, or one for each kind of layer: `{full: NAME, sliding: {use:
    NAME, …}}`; `draft` is for the layers of a draft model."""

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
    """The scheme for the layers whose names in the checkpoint match a glob."""

    match: str = "*"

    @model_validator(mode="before")
    @classmethod
    def _separate_match(cls, value: Any) -> Any:
        if isinstance(value, dict) and "match" in value and "options" not in value:
            rest = {k: v for k, v in value.items() if k != "match"}
            return {"match": value["match"], **ProviderConfig.model_validate(rest).model_dump()}
        return value


class QuantizationConfig(BaseModel):
    """One scheme for the whole model, or a list of rules, `[{match: GLOB, use: NAME}]`, of which
    the first that matches a layer applies.

    Layers that no rule matches stay as they are in the checkpoint.
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
    """Candidates that repeat the computation of a share of the steps beside the selected providers;
    their results are compared, timed and discarded. `{attention: NAME, quantization: NAME, share:
    0.1}`; one of the two providers may be omitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: AttentionConfig | None = None
    quantization: ProviderConfig | None = None
    share: float = Field(0.1, gt=0, le=1, description="fraction of the steps to compare")

    @model_validator(mode="after")
    def _has_candidate(self) -> ShadowConfig:
        if self.attention is None and self.quantization is None:
            raise ValueError("names no candidate: set attention, quantization or both")
        return self


class EngineConfig(BaseModel):
    """The providers and options that a user requests. Precedence: code and command line over
    environment (DOVETAIL_…) over file over these defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("demo", description="a plugin's model name, a local path or a hub id")
    revision: str | None = Field(
        None, description="branch, tag or commit of a model on the hub; default: the main branch"
    )
    served_model_name: str | None = Field(
        None, description="model name in the API; default: `model`"
    )
    device: str = Field("auto", description="auto, cpu, cuda:0, …")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of weights and activations; auto: the checkpoint's dtype"
    )
    max_model_len: int | None = Field(
        None, ge=1, description="maximum sequence length; default: the model's context length"
    )
    quantization: QuantizationConfig = Field(
        QuantizationConfig(),
        description=(
            "extension point: one scheme for the whole model, or rules for some layers; auto: as"
            " stored in the checkpoint"
        ),
    )
    matmul: ProviderConfig = Field(
        ProviderConfig(),
        description="extension point: GEMM with quantized weights, used if there are any",
    )
    architecture: ProviderConfig = Field(
        ProviderConfig(), description="extension point: model code"
    )
    worker: ProviderConfig = Field(
        ProviderConfig(),
        description="extension point: runs the model; `dovetail plugins` lists the providers",
    )
    attention: AttentionConfig = Field(
        AttentionConfig(), description="extension point: for all layers, or per layer kind"
    )
    kv_cache: ProviderConfig = Field(
        ProviderConfig(), description="extension point: owns the KV blocks"
    )
    scheduler: ProviderConfig = Field(
        ProviderConfig(), description="extension point: selects the tokens of each step"
    )
    prefix_cache: ProviderConfig = Field(
        ProviderConfig(), description="extension point: reuses KV between requests; none: disabled"
    )
    speculation: ProviderConfig = Field(
        ProviderConfig(use="none"),
        description="extension point: proposes draft tokens; none: disabled",
    )
    server: ProviderConfig = Field(
        ProviderConfig(), description="extension point: the server of `dovetail serve`"
    )
    shadow: ShadowConfig | None = Field(
        None,
        description=(
            "candidates to compare with the selected providers on live traffic: {attention: NAME,"
            " quantization: NAME, share: 0.1}"
        ),
    )
    overlap: bool | Literal["auto"] = Field(
        "auto",
        description=(
            "schedule the next step while one runs; auto: enabled unless both would share the same"
            " cores (cpu)"
        ),
    )
    max_num_waiting: int = Field(
        1024, ge=1, description="maximum number of waiting sequences; more are rejected as overload"
    )
    queue_timeout: float | None = Field(
        None,
        gt=0,
        description=(
            "seconds that a request may wait for its first step before it is rejected as overload"
        ),
    )
    request_timeout: float | None = Field(
        None, gt=0, description="seconds that a request may take in total before it is ended"
    )
    stall_timeout: float = Field(
        60,
        ge=1,
        description=(
            "seconds after which a step counts as stalled, or five times its predicted time if that"
            " is longer"
        ),
    )
    heartbeat_timeout: float = Field(
        2, ge=0.5, description="seconds without a heartbeat after which the process is replaced"
    )
    load_timeout: float = Field(
        600, ge=1, description="seconds without progress after which loading counts as stalled"
    )
    trust_remote_code: bool = Field(False, description="run code from the model folder")

    @field_validator("model")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty: set a model name, a local path or a hub id")
        return value


def load_config(
    file: str | os.PathLike[str] | None = None, env: dict[str, str] | None = None, **values: Any
) -> EngineConfig:
    """Merge file, environment and `values` (highest precedence). Raises `ConfigError` with the path
    of the field and its origin."""
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
    """Merge `high` over `low`. Options of one extension point are merged unless `high` names
    another provider."""
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
