from __future__ import annotations
import math
from typing import Any, Literal
import msgspec
from dovetail.errors import InvalidRequest
FinishReason = Literal['stop', 'length', 'abort', 'error']
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_LOGPROBS = 64
MAX_LOGIT_BIAS = 1024
GREEDY_BELOW = 1e-05
DRAFTED_BY_WORKER = -1

class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        ...

    @property
    def penalized(self) -> bool:
        ...

def check_range(name: str, value: float | None, low: float | None, high: float | None, *, whole: bool=False) -> None:
    ...

class Request(msgspec.Struct, frozen=True):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    eos_token_ids: list[int]
    priority: int = 0
    arrival: float = 0.0
    adapter_id: str | None = None
    cache_salt: str | None = None

class TokenLogprobs(msgspec.Struct, array_like=True):
    token_ids: list[int]
    logprobs: list[float]
    rank: int

class SequenceStart(msgspec.Struct, array_like=True):
    seq_id: int
    request_id: str
    sample_index: int
    token_ids: list[int]
    num_prompt_tokens: int
    block_ids: list[list[int]]
    params: SamplingParams
    seed: int
    eos_token_ids: list[int]
    max_len: int
    adapter_id: str | None = None

class BlockOp(msgspec.Struct, array_like=True):
    kind: Literal['copy', 'out', 'in']
    group: int
    src: int
    dst: int

class StepPlan(msgspec.Struct, array_like=True):
    step_id: int
    seq_ids: list[int]
    num_tokens: list[int]
    num_computed: list[int]
    samples: list[bool]
    new_block_ids: list[list[list[int]]]
    draft_token_ids: list[list[int]] = []
    starts: list[SequenceStart] = []
    released: list[int] = []
    block_ops: list[BlockOp] = []
    masked: bool = False
    payloads: dict[str, bytes] = {}

class StepResult(msgspec.Struct, array_like=True):
    step_id: int
    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs]] = []
    prompt_logprobs: list[list[TokenLogprobs]] = []
    failed: dict[int, str] = {}
    payloads: dict[str, bytes] = {}

class RequestTimes(msgspec.Struct, array_like=True, gc=False):
    queue_seconds: float
    prefill_seconds: float

class SequenceOutput(msgspec.Struct, array_like=True, gc=False):
    request_id: str
    sample_index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: tuple[str, str] | None = None
    num_cached_tokens: int = 0
    times: RequestTimes | None = None

class KVGroup(msgspec.Struct, frozen=True):
    layers: list[int]
    kind: str
    block_size: int
    bytes_per_block: int
    window: int | None = None

class EngineStats(msgspec.Struct):
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_failed_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    drafted_by_position: list[int] = []
    accepted_by_position: list[int] = []
    draft_seconds: float = 0.0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_prefix_evicted_blocks: dict[str, int] = {}
    num_prefix_blocks: dict[str, int] = {}

def to_builtins(value: Any) -> Any:
    ...
