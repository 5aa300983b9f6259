from __future__ import annotations
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from pydantic import BaseModel, ConfigDict, Field, field_validator
from dovetail.facts import DeviceFacts, ModelFacts
from dovetail.plan import Reason
if TYPE_CHECKING:
    from dovetail.plugin.build_context import BuildContext
T = TypeVar('T')

class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra='forbid')

class KVCacheOptions(Options):
    block_size: int | Literal['auto'] = Field('auto', description="tokens in a block, 1 to 256; auto is attention's: mostly 16")
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'int8'] = Field('auto', description="auto is the model's; fp8 (float8_e4m3fn) and int8 take half the memory of 16 bits")
    memory_fraction: float = Field(0.9, gt=0, le=1, description='share of the free memory that the engine may take; on a CPU at most 4 GiB: set memory_gb for more')
    memory_gb: float | None = Field(None, gt=0, description='GiB for the cache, instead of a share of the memory')

class SchedulerOptions(Options):
    max_num_seqs: int = Field(256, ge=1, description='sequences that run at a time')
    max_num_batched_tokens: int = Field(2048, ge=1, description='tokens in a step')

class LongestPrefixOptions(SchedulerOptions):
    max_overtaken: int = Field(64, ge=0, description='later sequences that may begin before one that waits; it is next then')
HOST_MEMORY = 'host_memory_gb'

class TieredCacheOptions(Options):
    host_memory_gb: float = Field(0, ge=0, description='GiB of host memory for blocks that the device has no room for; 0: none')

class DrafterOptions(Options):
    num_draft_tokens: int = Field(4, ge=1, le=32, description='most tokens proposed for a sequence in a step')
    adaptive: bool = Field(True, description='in each step only as many as pay, often none; false: always as many as there are')

class DraftModelOptions(DrafterOptions):
    model: str = Field('auto', min_length=1, description="that drafts: a plugin's model name, a local folder, a hub id; auto: the target's own")

@dataclass(frozen=True)
class Relation:
    extension_point: str
    providers: tuple[str, ...]
    because: str

    def meets(self, extension_point: str, *names: str) -> bool:
        ...
NO_COMPILER = Reason('no C++ compiler was found', 'install g++ or clang++, or set CXX')

def why_not_built(device: DeviceFacts, needed_flags: Sequence[str]) -> list[Reason]:
    ...

def why_not_gpu(context: Context, architecture: tuple[int, int]=(8, 0), cuda: tuple[int, int]=(12, 0)) -> list[Reason]:
    ...

@dataclass(frozen=True)
class Context:
    device: DeviceFacts
    model: ModelFacts | None
    device_name: str
    dtype: str
    needs: dict[str, Any] = field(default_factory=dict)

def no_reasons(context: Context) -> list[Reason]:
    ...

def as_given(context: Context, options: Options) -> tuple[Options, list[str]]:
    ...

def no_needs(context: Context, options: Options) -> dict[str, dict[str, Any]]:
    ...

@dataclass(frozen=True)
class Provider(Generic[T]):
    name: str
    summary: str
    build: Callable[[BuildContext, Any], T]
    options: type[Options] = Options
    capabilities: Any = None
    why_not: Callable[[Context], list[Reason]] = no_reasons
    resolve_options: Callable[[Context, Any], tuple[Options, list[str]]] = as_given
    priority: int = 0
    requires: tuple[Relation, ...] = ()
    conflicts: tuple[Relation, ...] = ()
    untested_with: tuple[Relation, ...] = ()
    needs: Callable[[Context, Any], dict[str, dict[str, Any]]] = no_needs
