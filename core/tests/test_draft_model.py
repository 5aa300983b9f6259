"""A drafter that runs in the worker: its model is found, compared with the target and planned for,
or refused, with why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from offers import attention, module_with, registry_of, why_not

from dovetail.composition.resolution import resolve
from dovetail.engine.checks import CheckedDrafter
from dovetail.errors import CheckpointError, ConfigError, PluginError
from dovetail.interfaces.drafter import DrafterCapabilities
from dovetail.interfaces.worker import WorkerCapabilities
from dovetail.plan import Plan
from dovetail.plugin.config import load_config
from dovetail.plugin.provider import DrafterOptions, DraftModelOptions, Provider
from dovetail.types import DRAFTED_BY_WORKER, Request, SamplingParams, SequenceStart, StepPlan
from dovetail_testing.plugin import make_model
from dovetail_testing.simulated import SimulatedWorker


def planned(
    model: Path, draft: Any, *, drafts: bool = True, kind: Any = DraftModelOptions, **values: Any
) -> Plan:
    """Of a composition in which a drafter runs in the worker, which declares `drafts`."""
    drafter = Provider("drafts", "", lambda c, o: None, kind, DrafterCapabilities(runs_in="worker"))
    worker = Provider("w", "", lambda c, o: None, capabilities=WorkerCapabilities(drafts=drafts))
    offers = [attention("plain", 9), attention("windowed", sliding_window=True)]
    registry = registry_of(
        x=module_with(
            dovetail_workers=[worker], dovetail_attention=offers, dovetail_drafters=[drafter]
        )
    )
    values = {
        "speculation": {
            "use": "drafts",
            **({"model": str(draft)} if draft else {}),
            **values.pop("more", {}),
        },
        **values,
    }
    return resolve(load_config(model=str(model), device="cpu", **values), registry)


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return make_model(tmp_path / "draft")


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_the_plan_holds_the_draft_model(model: Path, tmp_path: Path) -> None:
    draft = make_model(tmp_path / "draft", window=8)
    plan = planned(model, draft)
    assert plan.draft is not None
    assert (plan.draft.folder, plan.draft.architecture) == (str(draft), "SimulatedForCausalLM")
    assert plan.choices["attention.full"].provider == "plain"
    assert plan.choices["attention.draft"].provider == "windowed"
    assert why_not(plan.choices["attention.draft"], "plain") == ["no support for sliding window"]
    assert (
        planned(model, draft, attention={"full": "windowed"}).choices["attention.full"].provider
        == "windowed"
    )
    with pytest.raises(
        PluginError,
        match=r"attention\.draft: 'plain' cannot be used here: no support for sliding window",
    ):
        planned(model, draft, attention={"draft": "plain"})


def test_a_plan_with_a_draft_model_travels(model: Path, draft: Path) -> None:
    plan = planned(model, draft)
    assert Plan.decode(plan.encode()).fingerprint == plan.fingerprint
    assert planned(model, draft, more={"num_draft_tokens": 7}).fingerprint != plan.fingerprint


def test_a_worker_that_cannot_draft_is_refused(model: Path, draft: Path) -> None:
    with pytest.raises(
        PluginError,
        match=r"worker: .*\n.*does not run a draft model \(set speculation to a drafter",
    ):
        planned(model, draft, drafts=False)


def test_another_vocabulary_is_refused_with_what_differs(model: Path, draft: Path) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab["!"], vocab['"'] = vocab['"'], vocab["!"]

    edit(draft / "tokenizer.json", swap)
    said = (
        r"cannot draft for this model: its tokenizer differs: 2 tokens differ \('!' is \d+"
        r" instead of \d+; '\"' is"
    )
    with pytest.raises(ConfigError, match=said):
        planned(model, draft)

    def drop(tokenizer: dict[str, Any]) -> None:
        for token in "abcde":
            del tokenizer["model"]["vocab"][token]

    draft = make_model(draft)
    edit(draft / "tokenizer.json", drop)
    with pytest.raises(
        ConfigError, match=r"5 tokens differ \('a' is missing instead of \d+; .*; …\)"
    ):
        planned(model, draft)


def test_tokenizers_of_pieces_with_scores_are_compared_too(model: Path, draft: Path) -> None:
    def to_pieces(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = [
            [token, -1.0] for token in sorted(vocab, key=vocab.__getitem__)
        ]

    edit(draft / "tokenizer.json", to_pieces)
    assert planned(model, draft).draft is not None
    edit(draft / "tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].reverse())
    with pytest.raises(ConfigError, match="tokens differ"):
        planned(model, draft)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 77}, r"its vocabulary has 77 tokens, that of the model \d+"),
        (
            {"max_position_embeddings": 100},
            "its context is shorter than max_model_len 256: lower that to 100",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "its checkpoint is quantized with awq"),
    ],
)
def test_models_that_cannot_draft_are_refused(
    model: Path, draft: Path, change: dict[str, Any], said: str
) -> None:
    edit(draft / "config.json", lambda config: config.update(change))
    name = re.escape(repr(str(draft)))
    with pytest.raises(
        ConfigError, match=rf"speculation\.model: {name} cannot draft for this model: {said}"
    ):
        planned(model, draft)


def test_a_context_that_is_long_enough_will_do(model: Path, draft: Path) -> None:
    edit(draft / "config.json", lambda config: config.update(max_position_embeddings=100))
    assert planned(model, draft, max_model_len=100).draft is not None


def test_draft_models_that_are_not_there(model: Path, draft: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"speculation\.model: '.*nowhere' is neither a model provided by a plugin",
    ):
        planned(model, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty/config\.json is missing"):
        planned(model, tmp_path / "empty")
    (draft / "tokenizer.json").unlink()
    with pytest.raises(
        ConfigError, match=r"it has no tokenizer\.json, so the tokenizers cannot be compared"
    ):
        planned(model, draft)
    (draft / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable tokenizer"):
        planned(model, draft)


@pytest.mark.parametrize("count", [0, 33, -1, "many"])
def test_numbers_of_draft_tokens_out_of_range(model: Path, draft: Path, count: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"num_draft_tokens: .*Options of drafts: num_draft_tokens, adaptive, model",
    ):
        planned(model, draft, more={"num_draft_tokens": count})


def test_the_options_name_the_model(model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"speculation\.model: this model has no draft model of its own: name a"
    ):
        planned(model, None)
    with pytest.raises(
        PluginError,
        match="dist-x:drafts runs in the worker, but its options are not a subclass of DraftModel",
    ):
        planned(model, None, kind=DrafterOptions)


class Wrong:
    """Guesses tokens although the worker is to draft."""

    def propose(self, seq: Any, max_tokens: int) -> list[int]:
        return [5] * max_tokens

    def forget(self, seq_id: int) -> None:
        pass


def test_what_is_left_to_the_worker_is_nothing_else() -> None:
    from dovetail.sequence import Sequence

    seq = Sequence(
        0, Request("r", [1, 2], SamplingParams(), 9, 0, []), 0, [1, 2], num_computed_tokens=1
    )
    with pytest.raises(PluginError, match="proposed 5; token ids are integers from -1 to -1"):
        CheckedDrafter(Wrong(), 64, runs_in_worker=True).propose(seq, 4)
    assert CheckedDrafter(Wrong(), 64).propose(seq, 4) == [5] * 4


def test_the_simulated_worker_drafts_well_and_not_always() -> None:
    from dovetail.types import KVGroup

    worker = SimulatedWorker([KVGroup([0], "full", 4, 1)])
    worker.allocate([99])
    start = SequenceStart(0, "r", 0, [3], 1, [[]], SamplingParams(), 7, [], 300)
    computed, accepted, drafted, blocks, known = 0, 0, 0, 0, 1
    while known < 200:
        needed = -(-(known + 4) // 4) - blocks
        new = [[[blocks + 1 + i for i in range(needed)]]]
        plan = StepPlan(
            0, [0], [known - computed + 4], [computed], [True], new, [[DRAFTED_BY_WORKER] * 4]
        )
        plan.starts = [] if computed else [start]
        sampled = worker.sample(worker.submit(plan)).token_ids[0]
        blocks, drafted, accepted = blocks + needed, drafted + 4, accepted + len(sampled) - 1
        computed, known = known + len(sampled) - 1, known + len(sampled)
    assert drafted / 4 < accepted < drafted
