"""What is asked for beside tokens, and how a sequence ends, is the same with drafts:
log-probabilities, limits, stop tokens."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest

from dovetail.engine.engine import Engine
from dovetail.types import Request, SamplingParams
from dovetail_testing.engines import EOS, MAX_LEN, Outputs, Parts, Setup
from dovetail_testing.prefix_cache import new_paged, new_scheduler
from dovetail_testing.scheduler import Knowing

SETTINGS: tuple[dict[str, Any], ...] = (
    {"logprobs": 2},
    {"logprobs": 0, "prompt_logprobs": 1},
    {"min_tokens": 9},
    {"stop_token_ids": tuple(range(0, 64, 5))},
    {"stop_token_ids": tuple(range(0, 64, 3)), "min_tokens": 6, "logprobs": 1},
    {"n": 3, "logprobs": 1},
    {"temperature": 0},
    {"temperature": 0, "n": 2, "min_tokens": 4, "stop_token_ids": (1, 2, 3, 4, 5, 6)},
    {},
)


def requests(seed: int) -> list[Request]:
    rng = random.Random(seed)
    made = []
    for i, more in enumerate(SETTINGS):
        prompt = [rng.randrange(64) for _ in range(rng.randint(1, 24))]
        params = SamplingParams(
            max_tokens=rng.randint(max(1, more.get("min_tokens", 1)), 20), **more
        )
        made.append(
            Request(
                f"r{i}",
                prompt,
                params,
                min(params.max_tokens or 0, MAX_LEN - len(prompt)),
                i,
                [EOS],
            )
        )
    return made


def said(engine: Engine, asked: list[Request]) -> dict[tuple[str, int], list[Any]]:
    """By request and sample: tokens, their log-probabilities, the prompt's, the reason of the end
    and the stop token."""
    out: dict[tuple[str, int], list[Any]] = {}
    for r in asked:
        engine.add(r)
    while engine.has_work:
        for o in engine.step():
            assert o.error is None, o.error
            with_logprobs = (
                next(r for r in asked if r.request_id == o.request_id).params.logprobs is not None
            )
            assert len(o.logprobs) == (len(o.token_ids) if with_logprobs else 0)
            of = out.setdefault((o.request_id, o.sample_index), [[], [], [], None, None])
            for whole, news in zip(of, (o.token_ids, o.logprobs, o.prompt_logprobs), strict=False):
                whole += news
            of[3:] = [o.finish_reason or of[3], o.stop_token_id or of[4]]
    return out


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("spare_blocks", [0, 60])
def test_all_that_is_said_is_the_same_with_drafts(
    spare_blocks: int, window: int | None, overlap: bool
) -> None:
    seed = random.randrange(2**31)
    print("requests from seed", seed)
    asked = requests(seed)
    expected = said(
        Parts(new_paged, new_scheduler).engine(
            Setup(window=window, budget=400, max_num_seqs=30, spare_blocks=900)
        ),
        asked,
    )
    tokens: Outputs = {key: of[0] for key, of in expected.items()}
    drafted = Parts(new_paged, new_scheduler, partial(Knowing, tokens), num_draft_tokens=5)
    engine = drafted.engine(Setup(window=window, overlap=overlap, spare_blocks=spare_blocks))
    assert said(engine, asked) == expected
    assert engine.snapshot().num_accepted_tokens > 10
    assert engine.snapshot().num_draft_tokens > engine.snapshot().num_accepted_tokens
