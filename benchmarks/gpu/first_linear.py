"""The largest products of an 8B Llama by weights of the formats that matter most, beside
bfloat16."""

from __future__ import annotations

from part_linear import FORMATS, LAYERS, measure
from rows import DRY, Rows

NAMES = ("W4A16 in groups of 128", "FP8 W8A8", "FP8 W8A8 in groups of 128")
NUM_ROWS = (3,) if DRY else (1, 16, 256, 4096)


def run(rows: Rows) -> None:
    layers = {name: shape for name, shape in LAYERS.items() if name in ("gate_up", "down")}
    measure(rows, layers, [one for one in FORMATS if one.name in NAMES], NUM_ROWS)
