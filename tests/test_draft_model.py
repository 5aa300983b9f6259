"""A draft model in the worker changes nothing of what is said (numerical sameness, float32). A
model that drafts for itself is always right, as long as its KV and its noise are: so it shows that
they are."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from checkpoints import Checkpoint
from test_drafting import BEGINNINGS, SETTINGS, SOAK, said

from dovetail import LLM, SamplingParams
from dovetail.composition.lock import make_lock
from dovetail.composition.resolution import resolve
from dovetail.errors import PluginError
from dovetail.plugin.config import load_config
from dovetail.plugin.discovery import load_registry
from dovetail.sequence import Sequence
from dovetail.types import DRAFTED_BY_WORKER, EngineStats, SequenceStart, StepPlan
from dovetail_demo_model import WEIGHTS
from dovetail_spec_draft import DraftModel
from dovetail_worker_torch.runner.drafting import DraftRunner

TIGHT = {"memory_gb": 0.0022, "block_size": 16}
"""Room for little more than one sequence of 128 tokens of the demo model and its draft in
float32."""
LONG = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4


def drafting(model: Any = "demo-draft", num_draft_tokens: int = 4) -> dict[str, Any]:
    """Always so many: what is tested here is what the worker does, not whether it pays."""
    options = {"model": str(model), "num_draft_tokens": num_draft_tokens, "adaptive": False}
    return {"speculation": {"use": "draft-model", **options}}


def drafts_of(
    model: Any, prompts: list[Any], params: list[SamplingParams], *, rounds: int = 1, **values: Any
) -> tuple[list[Any], EngineStats]:
    """What is said in the last round, and the stats of all. The overlapped loop, a small budget,
    few batch rows."""
    common: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "overlap": True,
        "scheduler": {"max_num_batched_tokens": 24, "max_num_seqs": 5},
    }
    with LLM(model, **common | values) as llm:
        for _ in range(rounds):
            outputs = [c.token_ids for out in llm.generate(prompts, params) for c in out.outputs]
        stats = llm.engine.snapshot()
        assert llm.engine.kv.num_used == 0
    return outputs, stats


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rests for long, and then drafts few tokens, or many; for the sequences 12 to 15 (of the
    prompt `LONG`), never."""

    def propose(self: DraftModel, seq: Sequence, max_tokens: int) -> list[int]:
        is_at_rest = len(seq.tokens) // 7 % 2 == seq.seq_id % 2 or seq.seq_id // 4 == 3
        return [DRAFTED_BY_WORKER] * (
            0 if is_at_rest else min(max_tokens, 1 + (len(seq.tokens) * 7 + seq.seq_id) % 5)
        )

    monkeypatch.setattr(DraftModel, "propose", propose)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
@pytest.mark.parametrize("prefix_cache", ["none", "hash"])
def test_drafts_change_nothing(prefix_cache: str, overlap: bool) -> None:
    seed = random.randrange(2**31)
    print("prompts from seed", seed)
    rng, count = random.Random(seed), 11 * SOAK
    prompts = [
        rng.choice(BEGINNINGS) + rng.choice(["", "import ", "def ", LONG]) for _ in range(count)
    ]
    params = [
        SamplingParams(max_tokens=24, seed=i, **SETTINGS[i % len(SETTINGS)]) for i in range(count)
    ]
    expected, _ = said(prompts, params, prefix_cache="none", overlap=False)
    got, num_accepted = said(
        prompts, params, prefix_cache=prefix_cache, overlap=overlap, **drafting(num_draft_tokens=5)
    )
    assert num_accepted > count, "hardly a draft was accepted: the test says little"
    for i, ((tokens, ended, logprobs), (tokens_too, ended_too, logprobs_too)) in enumerate(
        zip(expected, got, strict=True)
    ):
        assert (tokens_too, ended_too) == (tokens, ended), f"sample {i}"
        for position, position_too in zip(logprobs or [], logprobs_too or [], strict=True):
            assert position_too == pytest.approx(position, abs=1e-3)


@pytest.mark.usefixtures("moody")
def test_drafts_change_nothing_with_rests_and_preemption() -> None:
    prompts = [BEGINNINGS[i % len(BEGINNINGS)] for i in range(9)]
    params = [
        SamplingParams(max_tokens=50, seed=i, ignore_eos=True, temperature=[0, 0.7][i % 2])
        for i in range(9)
    ]
    expected, _ = drafts_of("demo", prompts, params)
    got, stats = drafts_of("demo", prompts, params, kv_cache=TIGHT, **drafting())
    assert stats.num_preemptions > 0, "nobody was preempted: the test says little"
    assert stats.num_accepted_tokens > 0
    assert got == expected


@pytest.mark.parametrize("prefix_cache", ["none", "hash"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_model_that_drafts_for_itself_is_always_right(
    settings: dict[str, Any], prefix_cache: str
) -> None:
    """In chunks, catching up with long prompts in pieces, with the prefix cache in a second
    round."""
    prompts = [*BEGINNINGS, LONG]
    params = [SamplingParams(max_tokens=30, seed=i, **settings) for i in range(len(prompts))]
    _, stats = drafts_of(
        "demo", prompts, params, rounds=2, prefix_cache=prefix_cache, **drafting("demo")
    )
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 100
    assert (stats.num_prefix_hit_tokens > 100) == (prefix_cache == "hash")


@pytest.mark.usefixtures("moody")
@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
def test_it_catches_up_after_rests_and_preemption(temperature: float, tight: bool) -> None:
    """Also with blocks of a prefix that was computed while nobody drafted, and of the other samples
    of a request."""
    prompts = [*BEGINNINGS, LONG, LONG + "So"]
    params = [
        SamplingParams(max_tokens=40, seed=i, n=2, temperature=temperature)
        for i in range(len(prompts))
    ]
    values = {"kv_cache": TIGHT | {"memory_gb": 0.004}} if tight else {}
    expected, _ = drafts_of("demo", prompts, params, rounds=2)
    got, stats = drafts_of("demo", prompts, params, rounds=2, **values, **drafting("demo"))
    assert got == expected
    assert (stats.num_preemptions > 0) == tight
    assert stats.num_prefix_hit_tokens > 0
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 100


def test_after_a_long_rest_its_context_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """It then says what it would say after the last tokens alone; and goes on from there."""
    drafts, draft = list[tuple[list[int], int, list[int]]](), DraftRunner._draft

    def propose(self: DraftModel, seq: Sequence, max_tokens: int) -> list[int]:
        return [DRAFTED_BY_WORKER] * (
            max_tokens if seq.num_output_tokens < 10 or seq.num_output_tokens > 150 else 0
        )

    def noted(
        self: DraftRunner, batch_indices: list[int], known: list[int], counts: list[int]
    ) -> list[list[int]]:
        drafted = draft(self, batch_indices, known, counts)
        for batch_index, length, tokens in zip(batch_indices, known, drafted, strict=True):
            drafts.append(
                (
                    self._table.token_ids[batch_index, :length].tolist(),
                    self._num_skipped[batch_index],
                    tokens,
                )
            )
        return drafted

    monkeypatch.setattr(DraftModel, "propose", propose)
    monkeypatch.setattr(DraftRunner, "_draft", noted)
    params = [SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)] * 3
    prompts, values = [*BEGINNINGS[:2], LONG], {"max_model_len": 400}
    expected, _ = drafts_of("demo", prompts, params, **values)
    got, _ = drafts_of("demo", prompts, params, **values, **drafting("demo"))
    assert got == expected
    rested = [(tokens[skipped:], drafted) for tokens, skipped, drafted in drafts if skipped]
    assert len(rested) > 20
    assert 64 <= min(len(context) for context, _ in rested) < 80
    alone, _ = drafts_of(
        "demo",
        [context for context, _ in rested],
        [
            SamplingParams(max_tokens=len(drafted), temperature=0, ignore_eos=True)
            for _, drafted in rested
        ],
        **values,
    )
    assert alone == [drafted for _, drafted in rested]


@pytest.mark.parametrize("backend", ["torch-reference", "auto"])
@pytest.mark.parametrize("name", ["mistral", "qwen2", "gpt2 (bridge)"])
def test_every_kind_of_model_drafts(
    name: str, backend: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    """With sliding windows, through transformers, on the reference attention and on the tuned."""
    made, rng = checkpoint(name), random.Random(5)
    prompts = [[rng.randrange(3, 203) for _ in range(length)] for length in (2, 9, 40)]
    params = [
        SamplingParams(max_tokens=30, ignore_eos=True, seed=i, temperature=[0, 1][i % 2])
        for i in range(3)
    ]
    values: dict[str, Any] = {"attention": backend, "max_model_len": 96}
    expected, _ = drafts_of(made.folder, prompts, params, **values)
    got, stats = drafts_of(made.folder, prompts, params, **values, **drafting(made.folder, 5))
    assert got == expected
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 30


def wrong_at_every_fifth_place(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], list[tuple[int, int]]]:
    """The draft model's choices for such places are changed. What was accepted, and what was to be,
    by row and step."""
    seen: list[tuple[int, int]] = []
    verified, draw = DraftRunner.verified, DraftRunner._draw

    def spoilt(
        self: DraftRunner, logits: Any, batch_indices: Any, lengths: Any, is_plain: bool
    ) -> list[int]:
        tokens = draw(self, logits, batch_indices, lengths, is_plain)
        return [
            t ^ 1 if place % 5 == 4 else t
            for t, place in zip(tokens, lengths.tolist(), strict=True)
        ]

    def noted(self: DraftRunner, plan: StepPlan, sampled: list[list[int]]) -> None:
        for row, tokens in enumerate(plan.draft_token_ids):
            if tokens:
                places = range(plan.num_computed[row] + 1, plan.num_computed[row] + 1 + len(tokens))
                seen.append(
                    (
                        len(sampled[row]) - 1,
                        next((i for i, p in enumerate(places) if p % 5 == 4), len(tokens)),
                    )
                )
        verified(self, plan, sampled)

    monkeypatch.setattr(DraftRunner, "_draw", spoilt)
    monkeypatch.setattr(DraftRunner, "verified", noted)
    return lambda: [(got, wanted) for got, wanted in seen if got != wanted] if seen else [(0, 1)]


def run_spoilt() -> None:
    prompts = [*BEGINNINGS, LONG, LONG + "So"]
    params = [
        SamplingParams(max_tokens=40, seed=i, n=2, temperature=[0, 0.9][i % 2])
        for i in range(len(prompts))
    ]
    for kv_cache in (TIGHT | {"memory_gb": 0.004}, "paged"):
        drafts_of("demo", prompts, params, rounds=2, kv_cache=kv_cache, **drafting("demo"))


@pytest.mark.usefixtures("moody")
def test_what_follows_a_draft_that_was_not_accepted_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    different = wrong_at_every_fifth_place(monkeypatch)
    run_spoilt()
    assert not different()


def keeps_what_was_not_accepted(
    self: DraftRunner, plan: StepPlan, sampled: list[list[int]]
) -> None:
    pass


def keeps_old_notes(self: DraftRunner, plan: StepPlan) -> None:
    for start in plan.starts:
        self._num_computed[self._table.batch_index_of[start.seq_id]] = self._num_noted[
            self._table.batch_index_of[start.seq_id]
        ] = 0


def never_catches_up(self: DraftRunner, batch_index: int, known: int) -> int:
    return known - 1


def begins_where_the_model_does(self: DraftRunner, plan: StepPlan) -> None:
    UPDATE(self, plan)
    for start in plan.starts:
        row = plan.seq_ids.index(start.seq_id)
        self._num_computed[self._table.batch_index_of[start.seq_id]] = plan.num_computed[row]


UPDATE = DraftRunner.update
SABOTAGES = {
    "verified": keeps_what_was_not_accepted,
    "update": keeps_old_notes,
    "_begin": never_catches_up,
    "update ": begins_where_the_model_does,
}


@pytest.mark.usefixtures("moody")
@pytest.mark.parametrize("method", SABOTAGES)
def test_wrong_bookkeeping_is_noticed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the test above: with any of these mistakes a model disagrees with itself."""
    monkeypatch.setattr(DraftRunner, method.strip(), SABOTAGES[method])
    different = wrong_at_every_fifth_place(monkeypatch)
    run_spoilt()
    assert different()


@pytest.mark.parametrize(
    ("target", "draft"), [("gpt2 (bridge)", "llama-3.1"), ("llama-3.1", "gpt2 (bridge)")]
)
def test_model_and_draft_may_be_of_different_kinds(
    target: str, draft: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    made, rng = checkpoint(target), random.Random(6)
    prompts = [[rng.randrange(3, 203) for _ in range(length)] for length in (2, 9, 40)]
    params = [
        SamplingParams(max_tokens=20, ignore_eos=True, seed=i, temperature=[0, 1][i % 2])
        for i in range(3)
    ]
    expected, _ = drafts_of(made.folder, prompts, params, max_model_len=96)
    got, stats = drafts_of(
        made.folder, prompts, params, max_model_len=96, **drafting(checkpoint(draft).folder)
    )
    assert got == expected
    assert stats.num_draft_tokens > 0


def test_an_abort_between_draft_and_verification_loses_nothing() -> None:
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    with LLM("demo", dtype="float32", device="cpu", overlap=True, **drafting()) as llm:
        expected = llm.generate([BEGINNINGS[0]], params)[0].token_ids
        requests = [llm._maker.make(llm.tokenizer.encode(BEGINNINGS[0]), params) for _ in range(3)]
        for request in requests:
            llm.engine.add(request)
        tokens: list[int] = []
        for step in range(200):
            if step == 4:
                llm.engine.abort(requests[0].request_id)
                llm.engine.abort(requests[2].request_id)
            for output in llm.engine.step():
                if output.request_id == requests[1].request_id:
                    tokens += output.token_ids
            if not llm.engine.has_work:
                break
        assert tokens == expected
        assert llm.engine.kv.num_used == 0


def test_the_draft_may_be_a_folder() -> None:
    params = [SamplingParams(max_tokens=20, temperature=0)]
    outputs, stats = drafts_of("demo", [BEGINNINGS[0]], params, **drafting(WEIGHTS / "draft"))
    assert len(outputs[0]) == 20
    assert stats.num_draft_tokens > 0


def test_the_plan_and_the_lock_show_the_draft_model() -> None:
    registry = load_registry()
    lock, without = (
        make_lock(resolve(load_config(model="demo", device="cpu", **values), registry), registry)
        for values in (drafting(), {})
    )
    assert "draft" not in without
    plan = resolve(load_config(model="demo", device="cpu", speculation="draft-model"), registry)
    assert plan.choices["speculation"].options == {
        "num_draft_tokens": 4,
        "adaptive": True,
        "model": "demo-draft",
    }
    assert (lock["draft"]["name"], lock["draft"]["architecture"]) == (
        "demo-draft",
        "LlamaForCausalLM",
    )
    weights = (WEIGHTS / "draft" / "model.safetensors").read_bytes()
    assert lock["draft"]["files"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert {"model.draft", "architecture.draft", "attention.draft", "speculation"} <= set(
        lock["choices"]
    )


def test_a_step_without_a_draft_model_is_not_left_to_draft() -> None:
    with LLM("demo", device="cpu", overlap=False) as llm:
        start = SequenceStart(0, "r", 0, [5, 6], 2, [[]], SamplingParams(), 0, [], 9)
        plan = StepPlan(0, [0], [3], [0], [True], [[[1]]], [[DRAFTED_BY_WORKER]], [start])
        with pytest.raises(
            PluginError, match="leaves drafting to the worker, which was given no draft model"
        ):
            llm.engine.worker.submit(plan)
