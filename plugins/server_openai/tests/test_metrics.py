"""Test the metrics of speculative decoding as a dashboard reads them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from dovetail.types import EngineStats
from dovetail_server_openai.metrics import Metrics


def samples(stats: EngineStats, drafter: str | None) -> dict[str, float]:
    choice = SimpleNamespace(is_empty=drafter is None, qualified_name=drafter)
    plan = SimpleNamespace(served_model_name="m", choices={"speculation": choice})
    engine: Any = SimpleNamespace(plan=plan, stats=stats, shadow=None, num_restarts=0, pid=None)
    found = {}
    for family in text_string_to_metric_families(Metrics(engine, "dovetail:").text().decode()):
        for sample in family.samples:
            labels = ",".join(v for k, v in sample.labels.items() if k != "model_name")
            found[f"{sample.name.removeprefix('dovetail:')}{{{labels}}}"] = sample.value
    return found


def test_drafting_shows_how_much_of_it_counts_where_and_what_the_drafter_takes() -> None:
    stats = EngineStats(
        num_steps=10,
        num_generation_tokens=25,
        num_draft_tokens=9,
        num_accepted_tokens=6,
        drafted_by_position=[4, 3, 2],
        accepted_by_position=[3, 2, 1],
        draft_seconds=0.25,
    )
    found = {k: v for k, v in samples(stats, "dist:ngram").items() if k.startswith("spec_decode")}
    assert found == {
        "spec_decode_num_draft_tokens_total{}": 9,
        "spec_decode_num_accepted_tokens_total{}": 6,
        "spec_decode_num_drafts_total{}": 4,
        "spec_decode_mean_accepted_length{}": 1.5,
        "spec_decode_tokens_per_step{}": 2.5,
        "spec_decode_drafter_seconds_total{dist:ngram}": 0.25,
        "spec_decode_num_draft_tokens_per_pos_total{0}": 4,
        "spec_decode_num_draft_tokens_per_pos_total{1}": 3,
        "spec_decode_num_draft_tokens_per_pos_total{2}": 2,
        "spec_decode_num_accepted_tokens_per_pos_total{0}": 3,
        "spec_decode_num_accepted_tokens_per_pos_total{1}": 2,
        "spec_decode_num_accepted_tokens_per_pos_total{2}": 1,
    }


def test_speculation_before_the_first_draft_and_without_a_drafter() -> None:
    assert samples(EngineStats(), "dist:ngram")["spec_decode_mean_accepted_length{}"] == 0
    assert "spec_decode_tokens_per_step{}" not in samples(EngineStats(), None)
