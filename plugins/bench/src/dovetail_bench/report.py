"""Present measurements as tables, JSON and one HTML page."""

from __future__ import annotations

import base64
import html
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dovetail_bench.load import Figures
from dovetail_bench.machine import in_words


@dataclass
class Point:
    """All rounds at one concurrency."""

    concurrency: int
    num_requests: int
    rounds: list[Figures] = field(default_factory=list)
    step_us: Figures | None = None
    """Microseconds of a step by phase, if measured."""

    def column(self, name: str) -> list[float]:
        return [r[name] for r in self.rounds]

    @property
    def medians(self) -> Figures:
        return {name: statistics.median(self.column(name)) for name in self.rounds[0]}


@dataclass
class Report:
    """One run of `dovetail bench`."""

    kind: str
    date: str
    """ISO 8601, local time."""
    version: str
    model: str
    machine: dict[str, Any]
    plan: dict[str, Any]
    work: dict[str, Any]
    points: list[Point]

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.model} · {in_words(self.machine)} · {self.date[:10]}"

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Return (header, rows) of each table. A single point shows the range of its rounds, a
        sweep shows medians."""
        out = [self._sweep() if len(self.points) > 1 else self._single()]
        parts = [p for p in self.points if p.step_us is not None]
        if parts:
            names = list(parts[0].step_us or ())
            header = ["concurrency", *(f"{name} µs" for name in names)]
            out.append(
                (
                    header,
                    [
                        [str(p.concurrency), *(f"{(p.step_us or {})[n]:.0f}" for n in names)]
                        for p in parts
                    ],
                )
            )
        return out

    def _single(self) -> tuple[list[str], list[list[str]]]:
        point = self.points[0]
        rows = [
            [name, *(f"{f(point.column(name)):.2f}" for f in (statistics.median, min, max))]
            for name in point.rounds[0]
        ]
        return ["figure", "median", "lowest", "highest"], rows

    def _sweep(self) -> tuple[list[str], list[list[str]]]:
        names = list(self.points[0].rounds[0])
        return ["concurrency", *names], [
            [str(p.concurrency), *(f"{p.medians[n]:.1f}" for n in names)] for p in self.points
        ]

    def print(self, console: Console) -> None:
        console.print(self.title, style="bold", markup=False, highlight=False)
        for header, rows in self.tables():
            table = Table(box=None, pad_edge=False, header_style="bold")
            for i, name in enumerate(header):
                table.add_column(name, justify="right" if i else "left")
            for row in rows:
                table.add_row(*row)
            console.print(table)

    def write_json(self, path: Path) -> None:
        data = asdict(self)
        for point, source in zip(data["points"], self.points, strict=True):
            point["medians"] = source.medians
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def write_html(self, path: Path, svgs: list[str]) -> None:
        """Write one self-contained file with the plots embedded."""
        images = (base64.b64encode(svg.encode()).decode() for svg in svgs)
        parts = [f'<img src="data:image/svg+xml;base64,{image}">' for image in images]
        for header, rows in self.tables():
            lines = [_row(header, "th"), *(_row(row, "td") for row in rows)]
            parts.append(f"<table>{''.join(lines)}</table>")
        about = {
            "version": self.version,
            "machine": self.machine,
            "plan": self.plan,
            "work": self.work,
        }
        text = html.escape(json.dumps(about, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>machine, plan, work</summary><pre>{text}</pre></details>")
        title = html.escape(self.title)
        body = "\n".join(parts)
        path.write_text(_PAGE.format(title=title, body=body), encoding="utf-8")


def _row(cells: list[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }}
h1 {{ font-size: 1.3rem }} img {{ width: 100%; display: block; margin: 1rem 0 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .25rem .8rem; border-bottom: 1px solid #ddd }} pre {{ font-size: 12px }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0 }}
</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""  # noqa: E501
