"""The sampler against a plain reference, and the keyed noise against the distribution it must draw
from."""

from __future__ import annotations

import math
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dovetail.facts import device_facts
from dovetail.types import SamplingParams, SequenceStart
from dovetail_worker_torch.native import Kernels
from dovetail_worker_torch.sampling.backends import CompiledSampler, SamplerBackend, TorchSampler
from dovetail_worker_torch.sampling.noise import row_keys
from dovetail_worker_torch.sampling.sampler import SamplingRows, sample, token_logprobs

VOCAB = 37
EOS, STOP = 3, 4


def start(
    params: SamplingParams, seed: int = 0, index: int = 0, num_prompt: int = 1
) -> SequenceStart:
    return SequenceStart(0, "r", index, [], num_prompt, [], params, seed, [EOS], 100)


def rows_of(starts: list[SequenceStart], histories: list[list[int]]) -> SamplingRows:
    longest = max(map(len, histories))
    tokens = np.full(
        (len(starts), longest), 36, np.int32
    )  # what lies past a row's length must not matter
    for row, history in zip(tokens, histories, strict=True):
        row[: len(history)] = history
    return SamplingRows(starts, tokens, np.array([len(h) for h in histories], np.int64))


def reference_distribution(
    logits: Tensor, p: SamplingParams, history: list[int], num_prompt: int
) -> Tensor:
    """Token by token, in float64, in the order that `SamplingParams` documents. Returns
    probabilities [V]."""
    z = [float(x) for x in logits]
    for token, bias in p.logit_bias.items():
        z[token] += bias
    for token in set(history):
        z[token] = (
            z[token] / p.repetition_penalty if z[token] > 0 else z[token] * p.repetition_penalty
        )
    for token in set(history[num_prompt:]):
        z[token] -= p.presence_penalty + p.frequency_penalty * history[num_prompt:].count(token)
    if len(history) - num_prompt < p.min_tokens:
        for token in (EOS, *p.stop_token_ids):
            z[token] = -math.inf
    if p.temperature == 0:
        out = torch.zeros(len(z), dtype=torch.float64)
        out[max(range(len(z)), key=lambda i: z[i])] = 1
        return out
    z = [x / p.temperature for x in z]
    order = sorted(range(len(z)), key=lambda i: -z[i])
    keep = set(order[: p.top_k] if p.top_k > 0 else order)
    total = sum(math.exp(z[i]) for i in keep)
    mass, nucleus = 0.0, set()
    for i in order:
        if i in keep and mass < p.top_p:
            nucleus.add(i)
            mass += math.exp(z[i]) / total
    best = max(math.exp(z[i]) for i in nucleus)
    keep = {i for i in nucleus if math.exp(z[i]) >= p.min_p * best}
    probs = torch.tensor(
        [math.exp(x) if i in keep else 0.0 for i, x in enumerate(z)], dtype=torch.float64
    )
    return probs / probs.sum()


params_st = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, -1, 1, 3, 20, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([{}, {5: 4.0, 6: -100.0}]),
    min_tokens=st.sampled_from([0, 2, 9]),
    max_tokens=st.just(50),
    stop_token_ids=st.sampled_from([(), (STOP,)]),
)


@settings(max_examples=200, deadline=None)
@given(each=st.lists(params_st, min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_every_draw_is_one_that_the_reference_allows(
    sampler: SamplerBackend, each: list[SamplingParams], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    logits = torch.randn(len(each), VOCAB, generator=generator) * 3
    histories = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))] for _ in each]
    starts = [start(p, rng.randrange(-(2**63), 2**63)) for p in each]
    sampled, usable = sample(logits.clone(), rows_of(starts, histories), sampler)
    assert all(usable)
    for i, p in enumerate(each):
        probs = reference_distribution(logits[i], p, histories[i], 1)
        if p.temperature == 0:
            assert probs[sampled[i]] == 1
        else:
            # A token at the very edge of a cut may fall on either side of it in float32.
            looser = {"top_p": min(1.0, p.top_p + 1e-5), "min_p": max(0.0, p.min_p - 1e-5)}
            allowed = reference_distribution(logits[i], with_(p, **looser), histories[i], 1)
            assert allowed[sampled[i]] > 0


def with_(p: SamplingParams, **changes: Any) -> SamplingParams:
    import msgspec

    return msgspec.structs.replace(p, **changes)


@settings(max_examples=40, deadline=None)
@given(p=params_st, seed=st.integers(0, 2**31), others=st.integers(0, 5))
def test_a_sample_does_not_depend_on_other_rows(
    sampler: SamplerBackend, p: SamplingParams, seed: int, others: int
) -> None:
    logits = torch.randn(1 + others, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    each = [start(p, seed, 1)] + [
        start(SamplingParams(temperature=i % 2, top_k=i), i) for i in range(others)
    ]
    histories = [[1, 2, 3]] + [[i] * (i + 1) for i in range(others)]
    alone, _ = sample(logits[:1].clone(), rows_of(each[:1], histories[:1]), sampler)
    order = [*range(1, 1 + others), 0]
    together, _ = sample(
        logits[order].clone(),
        rows_of([each[i] for i in order], [histories[i] for i in order]),
        sampler,
    )
    assert together[-1] == alone[0]


@pytest.fixture(scope="module", params=["torch", "compiled"])
def sampler(request: pytest.FixtureRequest) -> SamplerBackend:
    return (
        TorchSampler()
        if request.param == "torch"
        else CompiledSampler(Kernels.load(device_facts()))
    )


CASES = {
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=1.8),
    "top-k": SamplingParams(top_k=7),
    "top-p": SamplingParams(top_p=0.8),
    "min-p": SamplingParams(min_p=0.1),
    "penalties": SamplingParams(
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5
    ),
    "all": SamplingParams(
        temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, logit_bias={5: 2.0}, frequency_penalty=0.3
    ),
}


FALSE_ALARM = 1e-4
"""Of one χ² test on a right sampler."""
NUM_SAMPLES = 20_000
NUM_CHUNKS = 50 if "DOVETAIL_SOAK" in os.environ else 1
"""Of NUM_SAMPLES each: `make soak` samples a million times in every case."""


@pytest.mark.parametrize("keyed_by", ["position", "seed", "sample index"])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_the_distribution(
    sampler: SamplerBackend, name: str, keyed_by: str
) -> None:
    """χ² over keyed samples, with a fresh seed every time."""
    p, base = CASES[name], random.randrange(2**62)
    print("seed", base)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(base % 2**31)) * 1.5
    history = [5, 9, 9, 30]
    observed = torch.zeros(VOCAB, dtype=torch.float64)
    for chunk in range(NUM_CHUNKS):
        keys = np.arange(chunk * NUM_SAMPLES, (chunk + 1) * NUM_SAMPLES)
        if keyed_by == "position":
            # Only the key's position differs: the history that penalties see stays the same.
            sampled = sample_at(sampler, logits.repeat(NUM_SAMPLES, 1), p, base, keys, history)
        else:
            seeds, indices = (
                (base + keys, 0 * keys) if keyed_by == "seed" else (0 * keys + base, keys)
            )
            starts = [start(p, int(s), int(i)) for s, i in zip(seeds, indices, strict=True)]
            tokens = np.tile(np.array(history, np.int32), (NUM_SAMPLES, 1))
            rows = SamplingRows(starts, tokens, np.full(NUM_SAMPLES, len(history), np.int64))
            sampled, usable = sample(logits.repeat(NUM_SAMPLES, 1), rows, sampler)
            assert all(usable)
        observed += torch.bincount(torch.tensor(sampled), minlength=VOCAB)
    expected = reference_distribution(logits, p, history, 1) * observed.sum()
    assert observed[expected == 0].sum() == 0
    chance = chance_of(observed, expected)
    assert chance > FALSE_ALARM, (
        f"a right sampler is as far off with probability {chance:.2g}: {observed.tolist()}"
    )


def chance_of(observed: Tensor, expected: Tensor) -> float:
    """Pearson's χ² test: the probability of being at least as far off. Tokens expected fewer than 5
    times count as one."""
    few = expected < 5
    both = [torch.cat([counts[~few], counts[few].sum()[None]]) for counts in (observed, expected)]
    both = [counts[both[1] > 0] for counts in both]
    if len(both[1]) == 1:
        return 1.0
    chi2 = ((both[0] - both[1]) ** 2 / both[1]).sum()
    return torch.special.gammaincc(
        torch.tensor((len(both[1]) - 1) / 2, dtype=torch.float64), chi2 / 2
    ).item()


def test_what_a_million_draws_can_tell() -> None:
    """A sampler half a percent off (total variation) is found out with a probability of 0.99 at
    least, however it is off: by Cauchy and Schwarz the non-centrality is least, 4 N δ², where all
    probabilities are off by the same share."""
    freedom, off = VOCAB - 1, 0.005
    power = power_of(freedom, 4 * 1_000_000 * off**2)
    assert power >= 0.99
    rng = np.random.default_rng()
    probs = rng.dirichlet(np.ones(VOCAB) * 3)
    by_size = np.argsort(probs)
    # Half of the mass, as nearly as whole tokens allow, gains what the other half loses.
    gains = np.zeros(VOCAB, bool)
    for token in by_size[::-1]:
        gains[token] = probs[gains].sum() + probs[token] <= 0.5
    biased = probs * np.where(gains, 1 + off / probs[gains].sum(), 1 - off / probs[~gains].sum())
    assert np.abs(biased - probs).sum() / 2 == pytest.approx(off)
    expected = torch.tensor(probs * 1_000_000)
    found = sum(
        chance_of(torch.tensor(c).double(), expected) <= FALSE_ALARM
        for c in rng.multinomial(1_000_000, biased, 200)
    )
    alarms = sum(
        chance_of(torch.tensor(c).double(), expected) <= FALSE_ALARM
        for c in rng.multinomial(1_000_000, probs, 200)
    )
    assert found >= 190, f"{found} of 200 biased samplers were found out; the power is {power:.4f}"
    assert alarms <= 3


def power_of(freedom: int, noncentrality: float) -> float:
    """The probability that noncentral χ² is beyond the limit of FALSE_ALARM: a Poisson mixture of
    central ones."""

    def tail(k: Tensor | float, x: float) -> Tensor:
        return torch.special.gammaincc(
            torch.as_tensor(k, dtype=torch.float64) / 2, torch.tensor(x / 2, dtype=torch.float64)
        )

    low, high = 0.0, 1000.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if tail(freedom, middle) > FALSE_ALARM else (low, middle)
    j = torch.arange(2000, dtype=torch.float64)
    weights = (j * math.log(noncentrality / 2) - noncentrality / 2 - torch.lgamma(j + 1)).exp()
    return (weights * torch.stack([tail(freedom + 2 * int(i), low) for i in j])).sum().item()


def sample_at(
    sampler: SamplerBackend,
    logits: Tensor,
    p: SamplingParams,
    seed: int,
    positions: np.ndarray[Any, Any],
    history: list[int],
) -> list[int]:
    """Draws whose keys differ by position alone, from the reference's probabilities."""
    probs = reference_distribution(logits[0], p, history, 1)
    z = probs.log().float().repeat(len(positions), 1)
    keys = row_keys(np.full(len(positions), seed), np.zeros(len(positions), np.int64), positions)
    sampler.add_gumbel_noise_(z, keys)
    return sampler.best(z)[0]


def test_noise_of_different_keys_is_unrelated(sampler: SamplerBackend) -> None:
    """Correlation of exponential noise between successive keys, over 200 pairs of rows of 50,000
    tokens."""
    width = 50_000
    keys = row_keys(np.full(201, 12345), np.zeros(201, np.int64), np.arange(201))
    noise = torch.zeros(201, width)
    sampler.add_gumbel_noise_(noise, keys)
    assert len(np.unique(keys)) == 201
    assert noise.isfinite().all()
    z = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True)
    correlations = (z[1:] * z[:-1]).mean(1)
    assert correlations.abs().max().item() < 5.5 / math.sqrt(width)
    # -log of exponential noise is Gumbel: mean 0.5772, variance π²/6.
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.003)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.01)


@pytest.mark.parametrize("vocab", [VOCAB, 64, 50_000])
def test_nan_makes_a_row_unusable_and_no_other(sampler: SamplerBackend, vocab: int) -> None:
    logits = torch.randn(4, vocab)
    logits[1, 7] = logits[3, -1] = math.nan
    starts = [
        start(SamplingParams(temperature=t, top_p=p)) for t, p in ((0, 1), (1, 0.9), (0, 1), (0, 1))
    ]
    _, usable = sample(logits, rows_of(starts, [[1]] * 4), sampler)
    assert usable == [True, False, True, False]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([3, 1000]),
    masked=st.booleans(),
    threads=st.integers(1, 3),
    own_threads=st.booleans(),
)
def test_the_compiled_sampler_is_the_torch_one(
    rows: int, vocab: int, seed: int, levels: int, masked: bool, threads: int, own_threads: bool
) -> None:
    """Ties and masked tokens included; the noise to a few units in the last place."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * levels).round() / levels * 3
    if masked:
        logits[:, rng.randrange(vocab)] = -math.inf
    plain, compiled = (
        TorchSampler(),
        CompiledSampler(Kernels.load(device_facts(), own_threads=own_threads)),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert compiled.best(logits) == plain.best(logits)
        ks = [rng.choice([0, 1, 2, 50, vocab]) for _ in range(rows)]
        ps = [rng.choice([1.0, 0.9, 0.3]) for _ in range(rows)]
        ours, theirs = logits.clone(), logits.clone()
        compiled.filter_top_k_top_p_(ours, ks, ps)
        plain.filter_top_k_top_p_(theirs, ks, ps)
        for i in range(
            rows
        ):  # where the mass of the nucleus is that of top_p to the last bit, either is right
            assert (ours[i] != theirs[i]).sum() <= (0 if ps[i] == 1 else 1)
        keys = row_keys(np.full(rows, seed), np.arange(rows), np.arange(rows))
        ours, theirs = torch.zeros(rows, vocab), torch.zeros(rows, vocab)
        compiled.add_gumbel_noise_(ours, keys)
        plain.add_gumbel_noise_(theirs, keys)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_the_compiled_sampler_does_not_depend_on_threads() -> None:
    rows, vocab = random.randrange(1, 5), random.randrange(40_000, 60_000)
    logits, keys = (
        torch.randn(rows, vocab),
        row_keys(np.arange(rows), np.arange(rows), np.arange(rows)),
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads, own_threads in ((1, False), (3, False), (3, True)):
            torch.set_num_threads(threads)
            sampler, x = (
                CompiledSampler(Kernels.load(device_facts(), own_threads=own_threads)),
                logits.clone(),
            )
            sampler.add_gumbel_noise_(x, keys)
            best = sampler.best(x)
            sampler.filter_top_k_top_p_(x, [100] * rows, [0.9] * rows)
            found.append((x, best))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0][0]) and best == found[0][1] for x, best in found)


def test_masks_allow_only_their_tokens(sampler: SamplerBackend) -> None:
    allowed = {2, 8, 36}
    bitmap = bytearray(-(-VOCAB // 8))
    for token in allowed:
        bitmap[token // 8] |= 1 << token % 8
    starts = [start(SamplingParams(), seed=i) for i in range(64)]
    rows = rows_of(starts, [[1]] * 64)
    masked = SamplingRows(
        rows.starts,
        rows.token_ids,
        rows.lengths,
        [bytes(bitmap) if i % 2 else None for i in range(64)],
    )
    sampled, _ = sample(torch.zeros(64, VOCAB), masked, sampler)
    assert set(sampled[1::2]) == allowed
    assert len(set(sampled[::2])) > 10


def test_logprobs_and_ranks() -> None:
    logits = torch.randn(4, VOCAB)
    reference = logits.double().log_softmax(-1)
    for row, (chosen, p) in enumerate(
        zip([0, 5, 9, 36], token_logprobs(logits, [0, 5, 9, 36], [0, 1, 3, 36]), strict=True)
    ):
        assert p.token_ids[0] == chosen
        assert len(p.token_ids) == 1 + [0, 1, 3, 36][row]
        assert p.logprobs == pytest.approx(
            [reference[row, t].item() for t in p.token_ids], abs=1e-5
        )
        assert p.logprobs[1:] == sorted(p.logprobs[1:], reverse=True)
        assert p.rank == 1 + int((reference[row] > reference[row, chosen]).sum())
