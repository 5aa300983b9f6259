"""The arithmetic behind the table of benchmarks/peers.py."""

from __future__ import annotations

import pytest
from peers.ratios import Round, markdown, number, rows


def taken(engine: str, number: int, case: str = "A", **figures: float) -> Round:
    return Round(
        engine,
        "tiny",
        case,
        number,
        {name.replace("_", " "): value for name, value in figures.items()},
    )


def test_a_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    """The machine is half as fast in round 2, for both: the ratio does not see it, a ratio of
    medians would."""
    rounds = [
        taken("us", 1, tokens=100),
        taken("them", 1, tokens=50),
        taken("us", 2, tokens=50),
        taken("them", 2, tokens=25),
        taken("us", 3, tokens=40),
        taken("them", 3, tokens=10),
    ]
    (row,) = rows(rounds, "us")
    assert row.times_better == {"them": 2.0}
    assert row.medians == {"us": 50, "them": 25}


def test_above_one_is_better_for_times_and_for_rates() -> None:
    ours, theirs = {"TTFT ms": 5.0, "tokens/s": 10.0}, {"TTFT ms": 10.0, "tokens/s": 40.0}
    ttft, rate = rows([Round("us", "m", "A", 1, ours), Round("them", "m", "A", 1, theirs)], "us")
    assert ttft.times_better == {"them": 2.0}
    assert rate.times_better == {"them": 0.25}


def test_rounds_that_have_no_counterpart_are_left_out() -> None:
    rounds = [
        taken("us", 1, tokens=10),
        taken("them", 1, tokens=20),
        taken("them", 2, tokens=1),
        taken("other", 3, tokens=7),
    ]
    (row,) = rows(rounds, "us")
    assert row.times_better == {"them": 0.5}
    assert set(row.medians) == {"us", "them", "other"}


def test_cases_and_models_are_rows_of_their_own_in_the_order_taken() -> None:
    rounds = [
        taken("us", 1, "B", tokens=1),
        taken("us", 1, "A", tokens=1),
        Round("us", "big", "B", 1, {"tokens": 1.0}),
    ]
    assert [(r.model, r.case) for r in rows(rounds, "us")] == [
        ("tiny", "B"),
        ("tiny", "A"),
        ("big", "B"),
    ]


def test_the_table_says_where_an_engine_took_no_part() -> None:
    rounds = [
        taken("us", 1, tokens=120),
        taken("them", 1, tokens=60),
        taken("them", 1, "E", tokens=3.14159),
    ]
    table = markdown(
        rows(rounds, "us"), {"us": "Dovetail", "them": "Other", "third": "Third"}, "us"
    )
    assert table.splitlines() == [
        "| model | case | figure | Dovetail | Other | Third |",
        "|---|---|---|---|---|---|",
        "| tiny | A | tokens | 120 | 60 (2.00 ×) | – |",
        "| tiny | E | tokens | – | 3.14 | – |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1234"), (99.94, "99.9"), (9.876, "9.88"), (99.96, "100"), (0.0123, "0.0123")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
