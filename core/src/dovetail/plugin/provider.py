"""Define the provider: what a plugin offers for an extension point, in one form for all of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dovetail.facts import DeviceFacts, ModelFacts
from dovetail.plan import Reason

if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext

T = TypeVar("T")


class Options(BaseModel):
    """Base class of every provider's options: frozen, typed, without unknown keys. The
    `description` of a field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class KVCacheOptions(Options):
    """Base class of the options of every KV-cache provider. Workers read them to size and lay out
    the cache."""

    block_size: int | Literal["auto"] = Field(
        "auto",
        description="tokens per block, 1 to 256; auto: set by the attention provider, usually 16",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn", "int8"] = Field(
        "auto",
        description=(
            "KV storage dtype; auto: the model's dtype; fp8 (float8_e4m3fn) and int8 need half the"
            " memory of 16-bit types"
        ),
    )
    memory_fraction: float = Field(
        0.9,
        gt=0,
        le=1,
        description=(
            "fraction of the free memory that the engine may use; at most 4 GiB on a CPU: set"
            " memory_gb for more"
        ),
    )
    memory_gb: float | None = Field(
        None, gt=0, description="size of the KV cache in GiB, instead of a fraction of the memory"
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _expand_aliases(cls, value: object) -> object:
        return "float8_e4m3fn" if value in ("fp8", "fp8_e4m3") else value

    @field_validator("block_size")
    @classmethod
    def _check_range(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 256:
            raise ValueError("must be from 1 to 256, or auto")
        return value


class SchedulerOptions(Options):
    """Base class of the options of every scheduler. The worker and the KV cache are sized for these
    limits."""

    max_num_seqs: int = Field(256, ge=1, description="maximum number of running sequences")
    max_num_batched_tokens: int = Field(
        2048, ge=1, description="token budget: maximum number of tokens per step"
    )


class LongestPrefixOptions(SchedulerOptions):
    """Options of the scheduler that starts sequences with the longest cached prefix first."""

    max_overtaken: int = Field(
        64,
        ge=0,
        description=(
            "number of later sequences that may start before a waiting one; it then starts next"
        ),
    )


HOST_MEMORY = "host_memory_gb"


class TieredCacheOptions(Options):
    """Base class of the options of a prefix cache that is a `TieredPrefixCache` if the size is not
    0."""

    host_memory_gb: float = Field(
        0,
        ge=0,
        description=(
            "GiB of host memory for blocks evicted from the device; 0 disables the host tier"
        ),
    )


class DrafterOptions(Options):
    """Base class of the options of every drafter."""

    num_draft_tokens: int = Field(
        4, ge=1, le=32, description="maximum number of draft tokens per sequence and step"
    )
    adaptive: bool = Field(
        True,
        description=(
            "propose only as many draft tokens per step as increase throughput, often none; false:"
            " always propose as many as possible"
        ),
    )


class DraftModelOptions(DrafterOptions):
    """Base class of the options of drafters that run in the worker, which loads this model beside
    its own."""

    model: str = Field(
        "auto",
        min_length=1,
        description=(
            "draft model: a plugin's model name, a local path or a hub id; auto: the draft model"
            " that belongs to the target model"
        ),
    )


@dataclass(frozen=True)
class Relation:
    """A provider's relation to the provider of another extension point."""

    extension_point: str
    providers: tuple[str, ...]
    """Provider names, or `dist:name`; `*` means any."""
    because: str

    def meets(self, extension_point: str, *names: str) -> bool:
        return self.extension_point == extension_point and (
            "*" in self.providers or not set(names).isdisjoint(self.providers)
        )


NO_COMPILER = Reason("no C++ compiler was found", "install g++ or clang++, or set CXX")


def why_not_installed(module: str, how: str) -> list[Reason]:
    """Why a provider that imports `module` cannot be used here. `how` says what to install."""
    if importlib.util.find_spec(module) is None:
        return [Reason(f"{module} is not installed", how)]
    return []


def why_not_built(device: DeviceFacts, needed_flags: Sequence[str]) -> list[Reason]:
    """Return why C++ for x86-64 Linux (dovetail.native) cannot be built and run here.
    `needed_flags` are required CPU flags."""
    if device.machine not in ("x86_64", "AMD64"):
        return [Reason(f"requires x86-64, but this machine is {device.machine}")]
    reasons = []
    if device.system != "Linux":
        reasons.append(Reason(f"requires Linux, but this system is {device.system}"))
    if missing := [f for f in needed_flags if f not in device.cpu_flags]:
        reasons.append(Reason(f"this CPU lacks {', '.join(missing)}"))
    return reasons if device.compiler is not None else [*reasons, NO_COMPILER]


def why_not_gpu(
    context: Context, architecture: tuple[int, int] = (8, 0), cuda: tuple[int, int] = (12, 0)
) -> list[Reason]:
    """Return why kernels for NVIDIA GPUs cannot run on the selected device; an empty list if it is
    not one. The arguments are the minimum compute capability and the minimum CUDA version of the
    driver."""
    kind, _, index = context.device_name.partition(":")
    if kind != "cuda":
        return []
    gpu, reasons = context.device.gpus[int(index or 0)], []
    if gpu.capability < architecture:
        need = f"requires sm_{architecture[0]}{architecture[1]} or newer"
        reasons.append(
            Reason(
                f"{need}, but {context.device_name} ({gpu.name}) is {gpu.architecture}",
                code="device",
            )
        )
    if gpu.cuda < cuda:
        has = (
            f"the driver of {context.device_name} supports CUDA {gpu.cuda[0]}.{gpu.cuda[1]} at most"
        )
        reasons.append(
            Reason(
                f"{has}, but {cuda[0]}.{cuda[1]} is required",
                "install a newer driver",
                code="device",
            )
        )
    return reasons


@dataclass(frozen=True)
class Context:
    """The input of a provider's functions: facts, which are gathered once, and the requirements of
    the engine config."""

    device: DeviceFacts
    model: ModelFacts | None
    device_name: str
    """The selected device: cpu, cuda:0, …"""
    dtype: str
    needs: dict[str, Any] = field(default_factory=dict)
    """Requirements, with these keys per extension point:

    - attention: layer_kind, head_size, window, logit_soft_cap, sinks, block_size (an integer or
      "auto"), max_model_len, kv_dtype
    - worker: compiled_attention and graph_capture (whether all selected attention providers declare
      `compiled_steps` and `graph_capture`); architecture and quantization (the capabilities of the
      selected providers: one, and a list by rule); shadow (whether shadow candidates run); drafts
      (whether a draft model runs); host_tier (whether the prefix cache has a host tier)
    - speculation: by_name (whether the drafter was requested by name)
    - prefix_cache: host_tier
    - architecture: quantized (the schemes of its layers)
    - quantization: by_name (whether the scheme was requested by name); some_layers (whether the
      rule covers only some layers)
    """


def no_reasons(context: Context) -> list[Reason]:
    return []


def as_given(context: Context, options: Options) -> tuple[Options, list[str]]:
    return options, []


def no_needs(context: Context, options: Options) -> dict[str, dict[str, Any]]:
    return {}


@dataclass(frozen=True)
class Provider(Generic[T]):
    """An offer of a plugin for an extension point: its name, its capabilities, why it may not be
    usable here, and how to build it."""

    name: str
    summary: str
    build: Callable[[BuildContext, Any], T]
    """Called with an instance of `options`, in the process that runs the object."""
    options: type[Options] = Options
    capabilities: Any = None
    why_not: Callable[[Context], list[Reason]] = no_reasons
    """A pure function of the context that imports nothing heavy. An empty list means that the
    provider is usable."""
    resolve_options: Callable[[Context, Any], tuple[Options, list[str]]] = as_given
    """Resolves options left at `auto`. Called once per plan, for the selected provider. Returns the
    resolved options and notes explaining each decision. Raises `ConfigError` for options that are
    not possible here."""
    priority: int = 0
    """`auto` selects the usable provider with the highest priority. 0 is a plain reference, 50 a
    tuned implementation."""
    requires: tuple[Relation, ...] = ()
    """The other extension point must use one of these providers. An extension point that is empty
    or absent uses none of them."""
    conflicts: tuple[Relation, ...] = ()
    """The other extension point must not use any of these providers."""
    untested_with: tuple[Relation, ...] = ()
    """The combination is allowed, and the plan notes that it is untested."""
    needs: Callable[[Context, Any], dict[str, dict[str, Any]]] = no_needs
    """Called with the resolved options, for the selected provider. Returns what it needs from other
    extension points, by extension point, if that is less than its capabilities say:
    `{"matmul": {"codes": ["int8"]}}` for a model whose weights all have 8 bits."""
