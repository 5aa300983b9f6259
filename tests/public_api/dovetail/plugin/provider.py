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
T = TypeVar('T')

class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra='forbid')

class KVCacheOptions(Options):
    block_size: int | Literal['auto'] = Field('auto', description='tokens per block, 1 to 256; auto: set by the attention provider, usually 16')
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'int8'] = Field('auto', description="KV storage dtype; auto: the model's dtype; fp8 (float8_e4m3fn) and int8 need half the memory of 16-bit types")
    memory_fraction: float = Field(0.9, gt=0, le=1, description='fraction of the free memory that the engine may use; at most 4 GiB on a CPU: set memory_gb for more')
    memory_gb: float | None = Field(None, gt=0, description='size of the KV cache in GiB, instead of a fraction of the memory')

class SchedulerOptions(Options):
    max_num_seqs: int = Field(256, ge=1, description='maximum number of running sequences')
    max_num_batched_tokens: int = Field(2048, ge=1, description='token budget: maximum number of tokens per step')

class LongestPrefixOptions(SchedulerOptions):
    max_overtaken: int = Field(64, ge=0, description='number of later sequences that may start before a waiting one; it then starts next')
HOST_MEMORY = 'host_memory_gb'

class TieredCacheOptions(Options):
    host_memory_gb: float = Field(0, ge=0, description='GiB of host memory for blocks evicted from the device; 0 disables the host tier')

class DrafterOptions(Options):
    num_draft_tokens: int = Field(4, ge=1, le=32, description='maximum number of draft tokens per sequence and step')
    adaptive: bool = Field(True, description='propose only as many draft tokens per step as increase throughput, often none; false: always propose as many as possible')

class DraftModelOptions(DrafterOptions):
    model: str = Field('auto', min_length=1, description="draft model: a plugin's model name, a local path or a hub id; auto: the draft model that belongs to the target model")

@dataclass(frozen=True)
class Relation:
    extension_point: str
    providers: tuple[str, ...]
    because: str

    def meets(self, extension_point: str, *names: str) -> bool:
        ...
NO_COMPILER = Reason('no C++ compiler was found', 'install g++ or clang++, or set CXX')

def why_not_installed(module: str, how: str) -> list[Reason]:
    ...

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
