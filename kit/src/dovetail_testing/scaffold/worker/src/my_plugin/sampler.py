"""Sample a token from logits, one row at a time, in the order that `SamplingParams` documents:
bias, penalties, min_tokens, temperature, top_k, top_p, min_p, sampling.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from dovetail.types import SequenceStart, TokenLogprobs

NEVER = -torch.inf


def sample_token(
    logits: Tensor, start: SequenceStart, tokens: list[int], mask: bytes | None
) -> int:
    """Sample the token after `tokens` from the raw `logits` f32[V]; `mask` is a bitmap of the
    allowed tokens, little-endian."""
    params, logits = start.params, logits.clone()
    if mask is not None:
        allowed = [bool(mask[i // 8] >> i % 8 & 1) for i in range(len(logits))]
        logits[~torch.tensor(allowed)] = NEVER
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if params.penalized:
        seen = torch.tensor(sorted(set(tokens)))
        scaled = torch.where(
            logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty
        )
        logits[seen] = scaled[seen]
        counts = torch.bincount(
            torch.tensor(tokens[start.num_prompt_tokens :], dtype=torch.int64),
            minlength=len(logits),
        )
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    if len(tokens) - start.num_prompt_tokens < params.min_tokens:
        logits[[*start.eos_token_ids, *params.stop_token_ids]] = NEVER
    if params.greedy:
        return int(logits.argmax())
    logits /= params.temperature
    if 0 < params.top_k < len(logits):
        logits[logits < logits.topk(params.top_k).values[-1]] = NEVER
    if params.top_p < 1:
        probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
        logits[order[probabilities.cumsum(-1) - probabilities >= params.top_p]] = NEVER
    if params.min_p:
        probabilities = logits.softmax(-1)
        logits[probabilities < params.min_p * probabilities.max()] = NEVER
    # The argmax of logits - log(e), with exponential e, is a sample from their softmax (the
    # Gumbel-max trick).
    return int((logits - noise(start.seed, start.sample_index, len(tokens), len(logits))).argmax())


def noise(seed: int, sample_index: int, position: int, vocab_size: int) -> Tensor:
    """Return f32[V] of log(e). It depends only on the key, so that the tokens of a request do not
    depend on other rows or restarts."""
    key = blake2b(f"{seed} {sample_index} {position}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.empty(vocab_size).exponential_(generator=generator).log()


def logprobs_of(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Return the token at the position with its rank, and the `count` most likely tokens, in the
    raw distribution."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(count, len(logits)))
    rank = 1 + int((logprobs > logprobs[token]).sum())
    return TokenLogprobs(
        [token, *best.indices.tolist()], [float(logprobs[token]), *best.values.tolist()], rank
    )
