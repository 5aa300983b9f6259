"""Plot a report. matplotlib is imported only when plotting."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.errors import ConfigError
from dovetail_bench.profiling import PARTS
from dovetail_bench.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2f6fab", "#e08a2e", "#4a9d6b", "#b8475a", "#7d68a8", "#9a9a9a")


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write `<kind>.png`, `<kind>-steps.png` if the phases of a step were measured, and
    `<kind>.html`. Returns the paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot write plots to {folder}: {e.strerror}") from None
    figures = {report.kind: curves(report)}
    if any(p.step_us for p in report.points):
        figures[f"{report.kind}-steps"] = step_parts(report)
    files, svgs = [], []
    for name, figure in figures.items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=150)
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
        svgs.append(svg.getvalue())
    files.append(folder / f"{report.kind}.html")
    report.write_html(files[-1], svgs)
    return files


def curves(report: Report) -> Figure:
    """Plot output tokens per second, time to first token and time between tokens by concurrency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(report.title, fontsize=11)
    speed, ttft, itl = figure.subplots(1, 3)
    _curve(report, speed, ("output tokens/s",), "output tokens/s")
    _curve(report, ttft, ("TTFT p50 ms", "TTFT p99 ms"), "time to first token, ms")
    _curve(report, itl, ("ITL p50 ms", "ITL p99 ms"), "time between tokens, ms")
    return figure


def _curve(report: Report, axes: Axes, names: tuple[str, ...], label: str) -> None:
    """Plot medians as a line and the range of all rounds as a band."""
    x = [p.concurrency for p in report.points]
    for name, colour in zip(names, COLOURS, strict=False):
        columns = [p.column(name) for p in report.points]
        axes.plot(
            x,
            [p.medians[name] for p in report.points],
            "o-",
            color=colour,
            label=name,
            markersize=4,
        )
        axes.fill_between(
            x,
            [min(c) for c in columns],
            [max(c) for c in columns],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(n) for n in x])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    _label(axes, label)
    if len(names) > 1:
        axes.legend(frameon=False)


def step_parts(report: Report) -> Figure:
    """Plot the mean duration of each phase of a step by concurrency as stacked bars, with and
    without the model's forward pass."""
    from matplotlib.figure import Figure

    points = [(str(p.concurrency), p.step_us) for p in report.points if p.step_us is not None]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    figure.suptitle(f"a step, {report.title}", fontsize=11)
    whole, host = figure.subplots(1, 2)
    for axes, skipped in ((whole, ""), (host, "forward")):
        bottom = [0.0] * len(points)
        for part, colour in zip((*PARTS, "other"), COLOURS, strict=True):
            if part != skipped:
                heights = [us[part] for _, us in points]
                axes.bar(
                    [name for name, _ in points],
                    heights,
                    bottom=bottom,
                    color=colour,
                    label=part,
                    width=0.7,
                )
                bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    _label(whole, "mean time of a step, µs")
    _label(host, "the same without forward, µs")
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, reverse=True)
    return figure


def _label(axes: Axes, label: str) -> None:
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
