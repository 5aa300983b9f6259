"""Define the data that the components of an engine exchange: requests, step plans, step results.

These types contain no tensors and no behaviour. All are msgspec structs: they are passed by
reference within a process and as msgpack between processes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from dovetail.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_LOGPROBS = 64
MAX_LOGIT_BIAS = 1024
MAX_TEMPERATURE = MAX_REPETITION_PENALTY = 1e6
"""Far above any useful value, and far below the limit of float32."""
GREEDY_BELOW = 1e-5
"""Lower temperatures are treated as greedy: dividing by them would overflow float32 logits, and
they select the most likely token anyway."""
DRAFTED_BY_WORKER = -1
"""Placeholder for a draft token that the worker proposes itself."""
_INT32, _INT64 = 2**31, 2**63


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters of one request, and the conditions that end generation.

    Values out of range raise `InvalidRequest`, which names the field. The logits are processed in
    this order: logit_bias, repetition / presence / frequency penalties, min_tokens, temperature,
    top_k, top_p, min_p; then a token is sampled.
    """

    n: int = 1
    """Number of sequences sampled from the prompt. Sample i of a seeded request does not depend on
    `n`."""
    max_tokens: int | None = 16
    """Maximum number of tokens to generate. None allows generation up to the end of the context; 0
    only scores the prompt."""
    min_tokens: int = 0
    """Number of tokens before which end-of-sequence and stop tokens cannot be sampled and stop
    strings are ignored."""
    temperature: float = 1.0
    """Sampling temperature. 0, and any value below 1e-5, means greedy."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 or -1 means all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Factor applied to tokens that occur in the prompt or the output (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Penalty on tokens that occur in the output."""
    frequency_penalty: float = 0.0
    """Penalty on tokens of the output, per occurrence."""
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """Seed of the sampling noise. None: a random seed is chosen when the request is accepted."""
    stop: tuple[str, ...] = ()
    """Stop strings. A list or a single string is also accepted."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """Return log-probabilities of the raw model distribution: of the sampled token and of this many
    most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for every prompt token except the first."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        msgspec.structs.force_setattr(self, "stop", stop)
        msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, low, high in (
            ("n", 1, MAX_N),
            ("max_tokens", 0, None),
            ("min_tokens", 0, None),
            ("top_k", -1, _INT32 - 1),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
            ("seed", -_INT64, _INT64 - 1),
        ):
            check_range(name, getattr(self, name), low, high, whole=True)
        bounds: tuple[tuple[str, float, float | None], ...] = (
            ("temperature", 0, MAX_TEMPERATURE),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0, MAX_REPETITION_PENALTY),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
        )
        for name, least, most in bounds:
            check_range(name, getattr(self, name), least, most)
        for name, least in (("top_p", 0.0), ("repetition_penalty", 1 / MAX_REPETITION_PENALTY)):
            if getattr(self, name) <= 0 or getattr(self, name) < least:
                raise InvalidRequest(
                    f"{name} must be {f'at least {least:g}' if least else 'above 0'}", param=name
                )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        if len(self.stop) > MAX_STOP_STRINGS or len(self.stop_token_ids) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"at most {MAX_STOP_STRINGS} stop strings and as many stop token ids, "
                f"not {len(self.stop)} and {len(self.stop_token_ids)}",
                param="stop",
            )
        if not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_STRING_CHARS for s in self.stop):
            raise InvalidRequest(
                f"a stop string has 1 to {MAX_STOP_STRING_CHARS} characters", param="stop"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"at most {MAX_LOGIT_BIAS} logit_bias entries", param="logit_bias")
        for token, bias in self.logit_bias.items():
            if not math.isfinite(bias) or abs(bias) > 100:
                raise InvalidRequest(
                    f"logit_bias of token {token} must be in [-100, 100], not {bias}",
                    param="logit_bias",
                )

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


def check_range(
    name: str, value: float | None, low: float | None, high: float | None, *, whole: bool = False
) -> None:
    """Raise `InvalidRequest` unless `value` is None or a finite number in [low, high]. A bound of
    None is open."""
    if value is None:
        return
    if not isinstance(value, int if whole else int | float) or isinstance(value, bool):
        raise InvalidRequest(
            f"{name} must be {'an integer' if whole else 'a number'}, not {value!r}", param=name
        )
    # An integer is always finite, even one too large for a float.
    infinite = isinstance(value, float) and not math.isfinite(value)
    if infinite or (low is not None and value < low) or (high is not None and value > high):
        span = f"in [{low}, {high}]" if high is not None else f"at least {low}"
        raise InvalidRequest(f"{name} must be finite and {span}, not {value}", param=name)


class Request(msgspec.Struct, frozen=True):
    """One prompt to be run by an engine: tokenized, checked against the model, and with its seed
    fixed."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    """`params.max_tokens`, resolved and limited to the context length."""
    seed: int
    eos_token_ids: list[int]
    """Tokens that end a sequence; empty under `ignore_eos`."""
    priority: int = 0
    """Priority of the request; lower runs first, if the scheduler uses it."""
    arrival: float = 0.0
    """Arrival time in seconds since the epoch."""
    adapter_id: str | None = None
    cache_salt: str | None = None
    """KV is shared only between requests with the same salt."""


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position: `token_ids[0]` is the token at this position, the others
    are the most likely tokens, best first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of `token_ids[0]` among all tokens; 1 is the most likely."""


class SequenceStart(msgspec.Struct, array_like=True):
    """Everything a worker needs to know about a sequence that is new to it, or that it released."""

    seq_id: int
    request_id: str
    sample_index: int
    token_ids: list[int]
    """Prompt and output tokens so far. After a preemption these are more than the prompt."""
    num_prompt_tokens: int
    block_ids: list[list[int]]
    """Block table so far, per KV group: shared blocks, often empty."""
    params: SamplingParams
    seed: int
    eos_token_ids: list[int]
    max_len: int
    """Upper bound on the number of tokens of the sequence, prompt included."""
    adapter_id: str | None = None


class BlockOp(msgspec.Struct, array_like=True):
    """A copy of one KV block, executed before the step's kernels.

    `kind` is copy (within the device), out (to block `dst` of the host tier) or in (from block
    `src` of the host tier); host blocks are counted from 0. Operations run in the order of the
    plan, since one may read what another wrote.
    """

    kind: Literal["copy", "out", "in"]
    group: int
    src: int
    dst: int


class StepPlan(msgspec.Struct, array_like=True):
    """The work of one step: flat lists with one entry per row, and only what changed since the last
    plan.

    Row i computes tokens `num_computed[i] … num_computed[i] + num_tokens[i] - 1` of sequence
    `seq_ids[i]`. The worker knows the tokens of each sequence from its `SequenceStart` and appends
    the tokens that it samples. The input of a row may therefore be a token that a step still in
    flight will sample, and it never has to be sent.
    """

    step_id: int
    seq_ids: list[int]
    num_tokens: list[int]
    num_computed: list[int]
    samples: list[bool]
    """True if the row reaches the last token of its sequence, so that a token is sampled after
    it."""
    new_block_ids: list[list[list[int]]]
    """Blocks to append to the row's block table, per KV group; an empty list if there are none."""
    draft_token_ids: list[list[int]] = []
    """Draft tokens per row, or an empty list. They are the last tokens of the row and counted in
    `num_tokens`. A row has either token ids, or only `DRAFTED_BY_WORKER` (-1): the worker then
    proposes that many draft tokens itself and verifies them in the same step."""
    starts: list[SequenceStart] = []
    """Sequences to add before the rows are looked up."""
    released: list[int] = []
    """Sequences to remove, before `starts` are added."""
    block_ops: list[BlockOp] = []
    masked: bool = False
    """Sampling waits for the masks passed to `sample`. Such a plan is not overlapped."""
    payloads: dict[str, bytes] = {}
    """Opaque inputs (embeddings, images), by a name that the model and the front-end agree on."""


class StepResult(msgspec.Struct, array_like=True):
    """The results of a step, with one entry per row in the order of the plan."""

    step_id: int
    token_ids: list[list[int]]
    """Sampled tokens: none for a row that does not sample; otherwise one, plus one for each
    accepted draft token."""
    logprobs: list[list[TokenLogprobs]] = []
    """Log-probabilities in the shape of `token_ids`, for rows that requested them; otherwise
    empty."""
    prompt_logprobs: list[list[TokenLogprobs]] = []
    """Per row, or an empty list: log-probabilities of the prompt tokens that follow this row's
    inputs."""
    failed: dict[int, str] = {}
    """Rows without a usable result (for example NaN logits), by seq_id, with the reason."""
    payloads: dict[str, bytes] = {}


class RequestTimes(msgspec.Struct, array_like=True, gc=False):
    """The parts of a sequence's time to first token."""

    queue_seconds: float
    """Seconds from arrival in the engine to the first step."""
    prefill_seconds: float
    """Seconds from the first step to the first token, preemptions included."""


class SequenceOutput(msgspec.Struct, array_like=True, gc=False):
    """Outputs of one sequence in a step, sent from the engine to the front-end. Never part of a
    reference cycle, so it is not tracked by the garbage collector."""

    request_id: str
    sample_index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token (never an end-of-sequence token) that ended the sequence."""
    error: tuple[str, str] | None = None
    """(code from errors.py, message) if `finish_reason` is "error"."""
    num_cached_tokens: int = 0
    """Number of prompt tokens found in the prefix cache; sent with the first tokens, and possibly
    again."""
    times: RequestTimes | None = None
    """Sent with the first token."""


class KVGroup(msgspec.Struct, frozen=True):
    """Layers whose KV cache shares one block numbering."""

    layers: list[int]
    kind: str
    """Layer kind for which the attention provider was selected: full, sliding, …"""
    block_size: int
    bytes_per_block: int
    """Size of a block in bytes, over all layers of the group, keys and values."""
    window: int | None = None
    """Window in tokens: a token attends to itself and the `window - 1` tokens before it. None means
    all tokens before it."""


class EngineStats(msgspec.Struct):
    """Counters since the engine's start, and gauges as of the last step."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens computed or found in the prefix cache; counted once per request."""
    num_generation_tokens: int = 0
    num_failed_steps: int = 0
    num_draft_tokens: int = 0
    """Number of draft tokens verified."""
    num_accepted_tokens: int = 0
    """Number of draft tokens accepted."""
    drafted_by_position: list[int] = []
    """Number of draft tokens verified, by position in the draft."""
    accepted_by_position: list[int] = []
    """Number of draft tokens accepted, by position in the draft."""
    draft_seconds: float = 0.0
    """Seconds spent in a drafter that runs in the engine."""
    num_prefix_queried_tokens: int = 0
    """Prompt tokens looked up in the prefix cache."""
    num_prefix_hit_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    num_prefix_evicted_blocks: dict[str, int] = {}
    """Blocks that the prefix cache has evicted so far, by cause: `device_full`, `host_full`,
    `reset`; or moved to another tier: `to_host`."""
    num_prefix_blocks: dict[str, int] = {}
    """Evictable blocks (cached, and referenced by no sequence), by tier: `device`, `host`."""


def to_builtins(value: Any) -> Any:
    """Return the JSON-ready form of any of the structs above."""
    return msgspec.to_builtins(value)
