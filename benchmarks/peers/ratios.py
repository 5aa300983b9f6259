"""From rounds that engines took in turn to a table of ratios. No engine, no clock: only
arithmetic."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

LESS_IS_BETTER = ("TTFT ms", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms", "start to first token, s")
"""All other figures are rates."""


@dataclass(frozen=True)
class Round:
    """What one engine reached in one round: by name of the figure."""

    engine: str
    model: str
    case: str
    number: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One figure of one case: medians by engine, and how many times better ours is than each
    other's."""

    model: str
    case: str
    figure: str
    medians: dict[str, float]
    times_better: dict[str, float]


def rows(rounds: list[Round], ours: str) -> list[Row]:
    """In the order in which the rounds were taken. A ratio is the median over rounds of the ratio
    within the round, so a machine that is slower for some rounds slows both sides; where ours has
    no round there is none."""
    values: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
    for r in rounds:
        for figure, value in r.figures.items():
            values.setdefault((r.model, r.case, figure), {}).setdefault(r.engine, {})[r.number] = (
                value
            )
    out = []
    for (model, case, figure), by_engine in values.items():
        mine = by_engine.get(ours, {})
        better = {}
        for engine, theirs in by_engine.items():
            pairs = [(mine[n], theirs[n]) for n in mine if n in theirs]
            if engine != ours and pairs:
                less = figure in LESS_IS_BETTER
                better[engine] = statistics.median(t / m if less else m / t for m, t in pairs)
        medians = {engine: statistics.median(v.values()) for engine, v in by_engine.items()}
        out.append(Row(model, case, figure, medians, better))
    return out


def markdown(table: list[Row], engines: dict[str, str], ours: str) -> str:
    """The table of the README. `engines` are titles by name, in the order of the columns."""
    others = {name: title for name, title in engines.items() if name != ours}
    lines = [
        _line("model", "case", "figure", engines[ours], *others.values()),
        "|---" * (4 + len(others)) + "|",
    ]
    for row in table:
        cells = [_cell(row, name) for name in others]
        mine = number(row.medians[ours]) if ours in row.medians else "–"
        lines.append(_line(row.model, row.case, row.figure, mine, *cells))
    return "\n".join(lines)


def _cell(row: Row, engine: str) -> str:
    if engine not in row.medians:
        return "–"
    ratio = f" ({row.times_better[engine]:.2f} ×)" if engine in row.times_better else ""
    return number(row.medians[engine]) + ratio


def number(value: float) -> str:
    """Three digits that mean something, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
