"""What a plugin offers for an extension point: one shape for all of them."""

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
    """Base of every provider's options: frozen, typed, no unknown keys. A field's `description` is
    its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class KVCacheOptions(Options):
    """What every KV-cache provider's options have: workers read them, to size and lay out the
    cache."""

    block_size: int | Literal["auto"] = Field(
        "auto", description="tokens in a block, 1 to 256; auto is attention's: mostly 16"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn", "int8"] = Field(
        "auto",
        description=(
            "auto is the model's; fp8 (float8_e4m3fn) and int8 take half the memory of 16 bits"
        ),
    )
    memory_fraction: float = Field(
        0.9,
        gt=0,
        le=1,
        description=(
            "share of the free memory that the engine may take; on a CPU at most 4 GiB: set"
            " memory_gb for more"
        ),
    )
    memory_gb: float | None = Field(
        None, gt=0, description="GiB for the cache, instead of a share of the memory"
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _in_full(cls, value: object) -> object:
        return "float8_e4m3fn" if value in ("fp8", "fp8_e4m3") else value

    @field_validator("block_size")
    @classmethod
    def _in_range(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 256:
            raise ValueError("must be from 1 to 256, or auto")
        return value


class SchedulerOptions(Options):
    """What every scheduler's options have: the limits that worker and cache are sized for."""

    max_num_seqs: int = Field(256, ge=1, description="sequences that run at a time")
    max_num_batched_tokens: int = Field(2048, ge=1, description="tokens in a step")


class LongestPrefixOptions(SchedulerOptions):
    """Those of the scheduler that starts what is cached first."""

    max_overtaken: int = Field(
        64,
        ge=0,
        description="later sequences that may begin before one that waits; it is next then",
    )


HOST_MEMORY = "host_memory_gb"


class TieredCacheOptions(Options):
    """Of a prefix cache that is a `TieredPrefixCache` where this is not 0."""

    host_memory_gb: float = Field(
        0,
        ge=0,
        description="GiB of host memory for blocks that the device has no room for; 0: none",
    )


class DrafterOptions(Options):
    """What every drafter's options have."""

    num_draft_tokens: int = Field(
        4, ge=1, le=32, description="most tokens proposed for a sequence in a step"
    )
    adaptive: bool = Field(
        True,
        description=(
            "in each step only as many as pay, often none; false: always as many as there are"
        ),
    )


class DraftModelOptions(DrafterOptions):
    """What the options of drafters that run in the worker have: it loads this model beside its
    own."""

    model: str = Field(
        "auto",
        min_length=1,
        description=(
            "that drafts: a plugin's model name, a local folder, a hub id; auto: the target's own"
        ),
    )


@dataclass(frozen=True)
class Relation:
    """What a provider says about another extension point's choice."""

    extension_point: str
    providers: tuple[str, ...]
    """Names, or `dist:name`; `*` is any."""
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
    """Why C++ for x86-64 and Linux (dovetail.native) cannot be built and run here; `needed_flags`
    are the CPU's."""
    if device.machine not in ("x86_64", "AMD64"):
        return [Reason(f"runs on x86-64, and this machine is {device.machine}")]
    reasons = []
    if device.system != "Linux":
        reasons.append(Reason(f"is built for Linux, and this is {device.system}"))
    if missing := [f for f in needed_flags if f not in device.cpu_flags]:
        reasons.append(Reason(f"this CPU has no {', '.join(missing)}"))
    return reasons if device.compiler is not None else [*reasons, NO_COMPILER]


def why_not_gpu(
    context: Context, architecture: tuple[int, int] = (8, 0), cuda: tuple[int, int] = (12, 0)
) -> list[Reason]:
    """Why kernels for NVIDIA GPUs cannot run on the device chosen, if that is one: they ask for a
    compute capability and for a driver of a CUDA version, of at least these."""
    kind, _, index = context.device_name.partition(":")
    if kind != "cuda":
        return []
    gpu, reasons = context.device.gpus[int(index or 0)], []
    if gpu.capability < architecture:
        need = f"needs sm_{architecture[0]}{architecture[1]} or newer"
        reasons.append(
            Reason(
                f"{need}, and {context.device_name} ({gpu.name}) is {gpu.architecture}",
                code="device",
            )
        )
    if gpu.cuda < cuda:
        has = f"the driver of {context.device_name} runs CUDA {gpu.cuda[0]}.{gpu.cuda[1]} at most"
        reasons.append(
            Reason(
                f"{has}, and {cuda[0]}.{cuda[1]} is needed", "install a newer driver", code="device"
            )
        )
    return reasons


@dataclass(frozen=True)
class Context:
    """What a provider is asked about: facts, gathered once, and what the composition needs of the
    extension point."""

    device: DeviceFacts
    model: ModelFacts | None
    device_name: str
    """The device chosen: cpu, cuda:0, …"""
    dtype: str
    needs: dict[str, Any] = field(default_factory=dict)
    """By extension point. For attention: layer_kind, head_size, window, logit_soft_cap, sinks,
    block_size (a number or "auto"), max_model_len, kv_dtype. For a worker: compiled_attention and
    graph_capture, whether all attention chosen declares `compiled_steps` and `graph_capture`;
    architecture and quantization, the capabilities of those chosen (one; a list by rule); shadow,
    whether candidates run; drafts, whether a draft model does. For speculation: by_name, whether
    the drafter was asked for by name. host_tier, whether the prefix cache is to have one. For an
    architecture: quantized, the schemes of its layers. For quantization: by_name, whether it was
    asked for by name; some_layers, whether the rule is for some layers only."""


def no_reasons(context: Context) -> list[Reason]:
    return []


def as_given(context: Context, options: Options) -> tuple[Options, list[str]]:
    return options, []


def no_needs(context: Context, options: Options) -> dict[str, dict[str, Any]]:
    return {}


@dataclass(frozen=True)
class Provider(Generic[T]):
    """An offer: how it is named, what it can do, why it may not be usable here, and how to build
    it."""

    name: str
    summary: str
    build: Callable[[BuildContext, Any], T]
    """Called with the options, an instance of `options`, in the process that runs the object."""
    options: type[Options] = Options
    capabilities: Any = None
    why_not: Callable[[Context], list[Reason]] = no_reasons
    """A pure function of the context; imports nothing heavy. An empty list means: usable."""
    resolve_options: Callable[[Context, Any], tuple[Options, list[str]]] = as_given
    """Called once, when the plan is made, if the provider was chosen. Returns the options with what
    they left open (an `auto`) decided, and remarks for the plan: what was decided, and why. Raises
    `ConfigError` for options that cannot be had here."""
    priority: int = 0
    """`auto` takes the usable provider of highest priority. 0 is a plain reference, 50 a tuned
    implementation."""
    requires: tuple[Relation, ...] = ()
    """The extension point takes one of these providers; one that is empty or absent takes none of
    them."""
    conflicts: tuple[Relation, ...] = ()
    """The extension point takes none of these providers."""
    untested_with: tuple[Relation, ...] = ()
    """Allowed, and said in the plan."""
    needs: Callable[[Context, Any], dict[str, dict[str, Any]]] = no_needs
    """Called with the settled options, if the provider was chosen: what it needs of another
    extension point here, by extension point, where that is less than its capabilities say:
    `{"matmul": {"codes": ["int8"]}}` for a model whose weights are all in 8 bits."""
