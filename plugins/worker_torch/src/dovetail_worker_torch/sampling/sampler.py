"""From logits to tokens: biases, penalties, temperature, top-k, top-p, min-p, and the keyed
sampling.

Works on R rows at once, each the logits after some token of some sequence. A step of greedy rows
without extras is one argmax; every other feature costs only when a row of the step asks for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dovetail.types import SamplingParams, SequenceStart, TokenLogprobs
from dovetail_worker_torch.accelerator import put
from dovetail_worker_torch.sampling.backends import MASKED, SamplerBackend, TorchSampler
from dovetail_worker_torch.sampling.noise import row_keys

TORCH = TorchSampler()


@dataclass(frozen=True)
class SamplingRows:
    """What the sampler must know of its R rows."""

    starts: list[SequenceStart]
    token_ids: npt.NDArray[np.int32]
    """[R, longest]: the row's tokens so far, prompt and output; what lies past `lengths` is
    ignored."""
    lengths: npt.NDArray[np.int64]
    """[R]"""
    masks: list[bytes | None] | None = None
    """Bitmaps of the tokens allowed, little-endian, or None for all."""


def sample(
    logits: Tensor, rows: SamplingRows, sampler: SamplerBackend = TORCH
) -> tuple[list[int], list[bool]]:
    """Draw one token a row from `logits` f32[R, V], which are overwritten. Returns (token ids,
    usable).

    A row whose logits hold NaN is not usable.
    """
    shape_logits(logits, rows, sampler)
    return sampler.best(logits)


def shape_logits(logits: Tensor, rows: SamplingRows, sampler: SamplerBackend = TORCH) -> None:
    """Change `logits` f32[R, V] so that the best token of each row is the one to draw. Waits for no
    device, unless there are masks or penalties, which read `rows.token_ids`."""
    params = [s.params for s in rows.starts]
    _apply_masks(logits, rows)
    _add_biases(logits, params)
    _apply_penalties(logits, params, rows)
    _hold_back_ends(logits, params, rows)
    sampled = [i for i, p in enumerate(params) if not p.greedy]
    if len(sampled) == len(params):
        _prepare_sampling(logits, params, rows, sampler)
    elif sampled:
        index = put(sampled, torch.int64, logits.device)
        part = logits[index]
        picked = SamplingRows(
            [rows.starts[i] for i in sampled], rows.token_ids[sampled], rows.lengths[sampled]
        )
        _prepare_sampling(part, [params[i] for i in sampled], picked, sampler)
        logits[index] = part


def _prepare_sampling(
    logits: Tensor, params: list[SamplingParams], rows: SamplingRows, sampler: SamplerBackend
) -> None:
    """Scale, filter and add noise, so that the argmax is the sampled token."""
    logits /= _column([p.temperature for p in params], logits)
    sampler.filter_top_k_top_p_(
        logits, [max(p.top_k, 0) for p in params], [p.top_p for p in params]
    )
    _filter_min_p(logits, params)
    seeds = np.array([s.seed for s in rows.starts], np.int64)
    indices = np.array([s.sample_index for s in rows.starts], np.int64)
    sampler.add_gumbel_noise_(logits, row_keys(seeds, indices, rows.lengths))


def _column(values: list[float], like: Tensor) -> Tensor:
    return put(values, torch.float32, like.device)[:, None]


def _apply_masks(logits: Tensor, rows: SamplingRows) -> None:
    for i, mask in enumerate(rows.masks or ()):
        if mask is not None:
            bits = np.unpackbits(
                np.frombuffer(mask, np.uint8), count=logits.shape[1], bitorder="little"
            )
            logits[i].masked_fill_(torch.from_numpy(bits == 0).to(logits.device), MASKED)


def _add_biases(logits: Tensor, params: list[SamplingParams]) -> None:
    flat = [(i, token, bias) for i, p in enumerate(params) for token, bias in p.logit_bias.items()]
    if flat:
        row, token, bias = zip(*flat, strict=True)
        place = (put(row, torch.int64, logits.device), put(token, torch.int64, logits.device))
        logits.index_put_(place, put(bias, torch.float32, logits.device), accumulate=True)


def _apply_penalties(logits: Tensor, params: list[SamplingParams], rows: SamplingRows) -> None:
    """Repetition over prompt and output (CTRL, arXiv 1909.05858); presence and frequency over the
    output."""
    vocab = logits.shape[1]
    for i, p in enumerate(params):
        if not p.penalized:
            continue
        tokens = torch.from_numpy(rows.token_ids[i, : rows.lengths[i]].astype(np.int64)).to(
            logits.device
        )
        row = logits[i]
        if p.repetition_penalty != 1:
            seen = torch.unique(tokens)
            value = row[seen]
            row[seen] = torch.where(
                value > 0, value / p.repetition_penalty, value * p.repetition_penalty
            )
        if p.presence_penalty or p.frequency_penalty:
            counts = torch.bincount(tokens[rows.starts[i].num_prompt_tokens :], minlength=vocab).to(
                torch.float32
            )
            row -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)


def _hold_back_ends(logits: Tensor, params: list[SamplingParams], rows: SamplingRows) -> None:
    """Before `min_tokens`, nothing that ends the sequence can be sampled."""
    for i, p in enumerate(params):
        if p.min_tokens and rows.lengths[i] - rows.starts[i].num_prompt_tokens < p.min_tokens:
            ends = [*rows.starts[i].eos_token_ids, *p.stop_token_ids]
            if ends:
                logits[i, put(ends, torch.int64, logits.device)] = MASKED


def _filter_min_p(logits: Tensor, params: list[SamplingParams]) -> None:
    """Keep tokens at least min_p times as probable as the best one."""
    if all(p.min_p == 0 for p in params):
        return
    floor = [math.log(p.min_p) if p.min_p else MASKED for p in params]
    logits.masked_fill_(logits < logits.amax(dim=-1, keepdim=True) + _column(floor, logits), MASKED)


def token_logprobs(logits: Tensor, chosen: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    """Of the raw distribution of `logits` f32[R, V]: the chosen token of each row, its rank, and
    the `num_top` best."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(chosen, device=logits.device)[:, None])
    ranks = (logprobs > own).sum(dim=-1).add_(1).tolist()
    top = logprobs.topk(min(max(num_top), logits.shape[1]), dim=-1) if max(num_top) else None
    values, ids = (
        (top.values.tolist(), top.indices.tolist())
        if top is not None
        else ([[]] * len(chosen),) * 2
    )
    return [
        TokenLogprobs([token, *ids[i][:n]], [value, *values[i][:n]], rank)
        for i, (token, value, rank, n) in enumerate(
            zip(chosen, own[:, 0].tolist(), ranks, num_top, strict=True)
        )
    ]
