"""What the parts of an engine say to each other: requests, step plans, step results. No tensors, no
behaviour.

All are msgspec structs, so the same objects pass by reference inside one process and as msgpack
between two.
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
"""Far beyond what makes a difference, and far from what float32 cannot hold."""
GREEDY_BELOW = 1e-5
"""Temperatures below this one would overflow float32 logits, and choose the best token anyway."""
DRAFTED_BY_WORKER = -1
"""In place of a draft token: the worker drafts it."""
_INT32, _INT64 = 2**31, 2**63


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of one request are sampled, and when it ends.

    Raises `InvalidRequest`, naming the field, for values out of range. Order of application to the
    logits: logit_bias, repetition / presence / frequency penalties, min_tokens, temperature, top_k,
    top_p, min_p, draw.
    """

    n: int = 1
    """Sequences sampled from the same prompt. Sample i of a seeded request is the same whatever `n`
    is."""
    max_tokens: int | None = 16
    """Most tokens to generate; None is up to the end of the context. 0 only scores the prompt."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be sampled, and stop strings do not count, before this
    many tokens."""
    temperature: float = 1.0
    """0, or anything below 1e-5, is greedy."""
    top_k: int = 0
    """0 or -1: all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Over the output."""
    frequency_penalty: float = 0.0
    """Over the output."""
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """None: sampled at random when the request is taken in."""
    stop: tuple[str, ...] = ()
    """A list, or a single string, is taken too."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """Log-probabilities of the raw model distribution: of the chosen token and of this many most
    likely ones."""
    prompt_logprobs: int | None = None
    """The same for every prompt token but the first."""

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
    """Raise `InvalidRequest` unless `value` is None or a finite number in [low, high]; an open end
    is None."""
    if value is None:
        return
    if not isinstance(value, int if whole else int | float) or isinstance(value, bool):
        raise InvalidRequest(
            f"{name} must be {'an integer' if whole else 'a number'}, not {value!r}", param=name
        )
    # An integer is always finite, also one that no float can hold.
    infinite = isinstance(value, float) and not math.isfinite(value)
    if infinite or (low is not None and value < low) or (high is not None and value > high):
        span = f"in [{low}, {high}]" if high is not None else f"at least {low}"
        raise InvalidRequest(f"{name} must be finite and {span}, not {value}", param=name)


class Request(msgspec.Struct, frozen=True):
    """One prompt on its way into an engine: tokenized, checked against the model, with its seed
    sampled."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    """`params.max_tokens`, resolved and clamped to the context."""
    seed: int
    eos_token_ids: list[int]
    """Tokens that end a sequence; empty under `ignore_eos`."""
    priority: int = 0
    """Lower runs first, where the scheduler looks at it."""
    arrival: float = 0.0
    """Seconds since the epoch."""
    adapter_id: str | None = None
    cache_salt: str | None = None
    """KV is shared only between requests of equal salt."""


class TokenLogprobs(msgspec.Struct, array_like=True):
    """One position: `token_ids[0]` is the token that stands there, the others the most likely, best
    first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Of `token_ids[0]` among all tokens; 1 is the most likely."""


class SequenceStart(msgspec.Struct, array_like=True):
    """All a worker must know of a sequence that it does not know (yet, or any more)."""

    seq_id: int
    request_id: str
    sample_index: int
    token_ids: list[int]
    """Prompt and output so far: after a preemption, more than the prompt."""
    num_prompt_tokens: int
    block_ids: list[list[int]]
    """Per KV group: the block table so far (shared blocks, mostly empty)."""
    params: SamplingParams
    seed: int
    eos_token_ids: list[int]
    max_len: int
    """Bound on the number of tokens that it will ever hold."""
    adapter_id: str | None = None


class BlockOp(msgspec.Struct, array_like=True):
    """Move KV before the step's kernels run: `kind` copy (within the device), out (to block `dst`
    of the host tier) or in (from block `src` of the host tier, counted from 0). Moves are done in
    the order of the plan: one may read what another wrote."""

    kind: Literal["copy", "out", "in"]
    group: int
    src: int
    dst: int


class StepPlan(msgspec.Struct, array_like=True):
    """What one step computes. Flat lists with one entry a row; only what changed since the last
    plan.

    Row i computes tokens `num_computed[i] … num_computed[i] + num_tokens[i] - 1` of sequence
    `seq_ids[i]`. The worker knows each sequence's tokens: from its `SequenceStart`, and because it
    appends what it samples itself. So a row's input may be a token that a step still in flight will
    sample, and nobody has to send it.
    """

    step_id: int
    seq_ids: list[int]
    num_tokens: list[int]
    num_computed: list[int]
    samples: list[bool]
    """The row reaches its sequence's last token, and a token is sampled after it."""
    new_block_ids: list[list[list[int]]]
    """Per row: the blocks to append to its block table, per KV group; an empty list where there are
    none."""
    draft_token_ids: list[list[int]] = []
    """Per row, or empty: the last tokens of the row are these, unverified; `num_tokens` counts
    them. A row's are tokens, or all `DRAFTED_BY_WORKER` (-1): the worker drafts as many itself, and
    then verifies them in the same step."""
    starts: list[SequenceStart] = []
    """Sequences to take in before the rows are looked up."""
    released: list[int] = []
    """Sequences to forget, before `starts` are taken in."""
    block_ops: list[BlockOp] = []
    masked: bool = False
    """Sampling waits for the masks given to `sample`; such a plan is not overlapped."""
    payloads: dict[str, bytes] = {}
    """Opaque inputs (embeddings, images) by a name that model and front-end agree on."""


class StepResult(msgspec.Struct, array_like=True):
    """What a step produced, row by row in the order of the plan."""

    step_id: int
    token_ids: list[list[int]]
    """Tokens sampled: none for a row that does not sample, else one, and one more for each accepted
    draft token."""
    logprobs: list[list[TokenLogprobs]] = []
    """Like `token_ids`, for the rows that asked; else empty."""
    prompt_logprobs: list[list[TokenLogprobs]] = []
    """Per row, or empty: of the prompt tokens that follow this row's inputs, within the prompt."""
    failed: dict[int, str] = {}
    """By seq_id: rows that produced nothing usable (say, NaN logits), and why."""
    payloads: dict[str, bytes] = {}


class RequestTimes(msgspec.Struct, array_like=True, gc=False):
    """Where a sequence's time to its first token went."""

    queue_seconds: float
    """From its arrival in the engine to its first step."""
    prefill_seconds: float
    """From its first step to its first token, preemptions included."""


class SequenceOutput(msgspec.Struct, array_like=True, gc=False):
    """News of one sequence, from the engine to the front-end. Never part of a cycle, so the
    collector need not look."""

    request_id: str
    sample_index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token (never an end-of-sequence token) that ended the sequence."""
    error: tuple[str, str] | None = None
    """(code of errors.py, message) when `finish_reason` is error."""
    num_cached_tokens: int = 0
    """Of the prompt, found in the prefix cache; told with the first tokens, and perhaps again."""
    times: RequestTimes | None = None
    """Told with the first token."""


class KVGroup(msgspec.Struct, frozen=True):
    """Layers whose KV lives in blocks of one numbering."""

    layers: list[int]
    kind: str
    """full, sliding, …: the layer kind that the attention provider was chosen for."""
    block_size: int
    bytes_per_block: int
    """Over all layers of the group, keys and values."""
    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it; None is all before it."""


class EngineStats(msgspec.Struct):
    """Counters since the start, and gauges as of the last step."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Computed, or found in the prefix cache; once a request."""
    num_generation_tokens: int = 0
    num_failed_steps: int = 0
    num_draft_tokens: int = 0
    """Verified; of these accepted:"""
    num_accepted_tokens: int = 0
    drafted_by_position: list[int] = []
    """The same, by position in the draft."""
    accepted_by_position: list[int] = []
    draft_seconds: float = 0.0
    """In the drafter, as far as it runs in the engine."""
    num_prefix_queried_tokens: int = 0
    """Prompt tokens looked for in the prefix cache; of these found:"""
    num_prefix_hit_tokens: int = 0
    num_prefix_evicted_blocks: dict[str, int] = {}
    """By cause: `KVCacheManager.num_evicted`."""
    num_prefix_blocks: dict[str, int] = {}
    """That nobody uses and that can be found again, by tier."""


def to_builtins(value: Any) -> Any:
    """JSON-ready form of any of the structs above."""
    return msgspec.to_builtins(value)
