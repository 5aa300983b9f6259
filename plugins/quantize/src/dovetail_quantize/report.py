"""Report a run as JSON, Markdown and a plot: errors by layer, sizes, and perplexity before and
after."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail_quantize.folder import OutputFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "quantization_report"


@dataclass(frozen=True)
class Report:
    layers: list[dict[str, Any]]
    """One entry per decoder layer: `errors` of its linear layers, and `drift`, the relative error
    of the hidden states after it."""
    bytes_before: int
    bytes_after: int
    perplexity: tuple[float, float] | None
    """Perplexity before and after."""
    text: str
    """The text on which the perplexity was measured, or the reason why it was not."""

    @property
    def worst(self) -> tuple[str, float]:
        """The linear layer with the largest error, and that error."""
        found = {f"layer {r['layer']} {n}": e for r in self.layers for n, e in r["errors"].items()}
        return max(found.items(), key=lambda item: item[1])

    def summary(self) -> str:
        sizes = f"{self.bytes_before / 1e6:,.1f} MB → {self.bytes_after / 1e6:,.1f} MB"
        name, error = self.worst
        lines = [
            f"weights {sizes} (× {self.bytes_after / self.bytes_before:.2f})",
            f"largest error {error:.2%}, {name}",
        ]
        if self.perplexity is not None:
            before, after = self.perplexity
            lines.append(
                f"perplexity {before:.3f} → {after:.3f} (× {after / before:.4f}; {self.text})"
            )
        else:
            lines.append(f"perplexity not measured: {self.text}")
        return "\n".join(lines)

    def write(self, folder: OutputFolder, title: str, settings: dict[str, Any]) -> None:
        """Write `quantization_report.json`, `.md` and `.svg`."""
        data = {
            "settings": settings,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "perplexity_before": self.perplexity[0] if self.perplexity else None,
            "perplexity_after": self.perplexity[1] if self.perplexity else None,
            "perplexity_text": self.text,
            "layers": self.layers,
        }
        folder.write_text(f"{NAME}.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        folder.write_with(f"{NAME}.svg", lambda path: self._plot(path, title))
        folder.write_text(f"{NAME}.md", self._markdown(title))

    def _markdown(self, title: str) -> str:
        names = list(self.layers[0]["errors"])
        has_drift = "drift" in self.layers[0]
        lines = [f"# {title}", "", *(f"- {line}" for line in self.summary().splitlines())]
        lines += ["", f"![errors by layer]({NAME}.svg)", ""]
        lines += [
            "Relative errors of each linear layer's outputs (of its weights, if there was no"
            " calibration text)"
            + ("; drift is the error of the hidden states after the layer." if has_drift else "."),
            "",
        ]
        lines.append(f"| layer | {' | '.join(names)} |{' drift |' if has_drift else ''}")
        lines.append("|---" * (len(names) + 1 + has_drift) + "|")
        for row in self.layers:
            cells = [f"{row['errors'].get(name, float('nan')):.2%}" for name in names]
            cells += [f"{row['drift']:.2%}"] if has_drift else []
            lines.append(f"| {row['layer']} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _plot(self, path: Path, title: str) -> None:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"svg.hashsalt": NAME}):
            figure = Figure(figsize=(11, 4), layout="constrained")
            figure.suptitle(title, fontsize=11)
            errors, sizes = figure.subplots(1, 2, width_ratios=(3, 1))
            x = [row["layer"] for row in self.layers]
            for name in self.layers[0]["errors"]:
                y = [100 * row["errors"].get(name, float("nan")) for row in self.layers]
                errors.plot(x, y, "o-", label=name, markersize=3)
            if "drift" in self.layers[0]:
                errors.plot(
                    x,
                    [100 * row["drift"] for row in self.layers],
                    "k--",
                    label="hidden states after the layer",
                )
            errors.set_ylim(bottom=0)
            errors.legend(frameon=False, fontsize=8)
            _label(errors, "decoder layer", "relative error, %")
            sizes.bar(
                ["before", "after"],
                [self.bytes_before / 1e6, self.bytes_after / 1e6],
                color=("#9a9a9a", "#2f6fab"),
            )
            text = (
                f"perplexity {self.perplexity[0]:.3f} → {self.perplexity[1]:.3f}"
                if self.perplexity
                else ""
            )
            _label(sizes, text, "weights, MB")
            figure.savefig(path, format="svg", metadata={"Date": None})


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
