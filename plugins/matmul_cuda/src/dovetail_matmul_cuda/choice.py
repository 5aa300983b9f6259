"""Choose the kernel of a product and its launch parameters from a table of measurements or, if
there is no measurement, by rule."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dovetail.errors import ConfigError
from dovetail.interfaces.matmul import WeightFormat

KERNELS = ("words", "dequantize", "codes", "scaled_mm")
LARGEST_ROWS = 8192
SLICE_BYTES = 16 * 2**20
"""Bytes of weights that are dequantized at a time, so that cuBLAS reads them from the L2 cache."""


@dataclass(frozen=True)
class Choice:
    """A kernel and its launch parameters. "words" and "codes" are kernels of kernels.py;
    "dequantize" dequantizes weights in slices of `block_n` outputs for cuBLAS; "scaled_mm" is
    PyTorch's and uses no other field."""

    kernel: str
    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    """Used by "codes" only, where it is limited to the places of a group. "words" processes a chunk
    per iteration."""
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Case:
    """The properties of a product on which a choice depends."""

    codes: str
    inputs: str | None
    group_size: int | None
    outs: int
    in_features: int
    rows: int
    """Rounded up by `bucket`."""

    @staticmethod
    def of(format: WeightFormat, outs: int, in_features: int, rows: int) -> Case:
        return Case(format.codes, format.inputs, format.group_size, outs, in_features, bucket(rows))

    def __str__(self) -> str:
        group = "" if self.group_size is None else f"-{self.group_size}"
        inputs = "" if self.inputs is None else f":{self.inputs}"
        return f"{self.codes}{group}{inputs} {self.outs}x{self.in_features}, {self.rows} rows"


def bucket(rows: int) -> int:
    """Return the number of rows rounded up to a power of two, at most `LARGEST_ROWS`."""
    return min(LARGEST_ROWS, 1 << (max(1, rows) - 1).bit_length())


class Table:
    """Choices by case. For a number of rows without a measurement, the choice for the next larger
    number is used, or that for the largest."""

    def __init__(self, choices: Mapping[Case, Choice] | None = None) -> None:
        self.choices = dict(choices or {})

    def find(self, case: Case) -> Choice | None:
        rows = sorted(c.rows for c in self.choices if _without_rows(c) == _without_rows(case))
        if not rows:
            return None
        near = next((r for r in rows if r >= case.rows), rows[-1])
        return self.choices[
            Case(case.codes, case.inputs, case.group_size, case.outs, case.in_features, near)
        ]

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write the file atomically, so that an interruption does not lose measurements."""
        entries = [asdict(case) | asdict(choice) for case, choice in self.choices.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        lines = ",\n  ".join(json.dumps(entry) for entry in entries)
        fresh.write_text(f'{{"about": {json.dumps(dict(about))},\n "entries": [\n  {lines}\n]}}\n')
        fresh.replace(path)

    @staticmethod
    def read(path: Path) -> Table:
        try:
            entries = json.loads(path.read_text())["entries"]
            found = {_from_entry(Case, entry): _from_entry(Choice, entry) for entry in entries}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ConfigError(
                f"cannot read the kernel table {path}: {type(e).__name__}: {e}"
            ) from e
        if unknown := {choice.kernel for choice in found.values()} - set(KERNELS):
            raise ConfigError(
                f"the kernel table {path} has unknown kernels: {', '.join(sorted(unknown))}. Known:"
                f" {', '.join(KERNELS)}"
            )
        return Table(found)


def table_for(gpu: str, path: str | None, environ: Mapping[str, str] = os.environ) -> Table:
    """Return the table at `path`, else the user's table for this GPU, else that of this package,
    else an empty one."""
    if path is not None:
        return Table.read(Path(path).expanduser())
    for candidate in (user_table(gpu, environ), Path(__file__).parent / "tables" / file_name(gpu)):
        if candidate.is_file():
            return Table.read(candidate)
    return Table()


def user_table(gpu: str, environ: Mapping[str, str] = os.environ) -> Path:
    home = environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "dovetail/kernels" / file_name(gpu)


def file_name(gpu: str) -> str:
    """Return the file name for a GPU, such as NVIDIA_H200.json."""
    return re.sub(r"\W+", "_", gpu).strip("_") + ".json"


def by_rule(case: Case, kinds: tuple[str, ...], num_sms: int, itemsize: int) -> Choice:
    """Return the choice for inputs of `itemsize` bytes. `kinds` are the kernels that support this
    product, the best one for many rows first."""
    rows = case.rows
    if "scaled_mm" in kinds:
        return Choice("scaled_mm")
    if "codes" in kinds:
        if rows <= 32:
            return _split(
                case, Choice("codes", 16 if rows <= 16 else 32, 64, num_stages=4), num_sms
            )
        if rows <= 128:
            return _split(case, Choice("codes", 64, 64), num_sms)
        return Choice("codes", 128, 128, num_warps=8)
    if "dequantize" in kinds and rows > 128:
        outs = max(256, SLICE_BYTES // (case.in_features * itemsize) // 256 * 256)
        return Choice("dequantize", block_n=outs)
    if itemsize == 4:  # products without tensor cores have their operands in registers
        return _split(case, Choice("words", 16, 32, num_stages=1), num_sms)
    if rows <= 32:
        return _split(case, Choice("words", 16 if rows <= 16 else 32, 64, num_stages=4), num_sms)
    return _split(
        case,
        Choice("words", 64, 64 if rows <= 64 else 128, num_warps=4 if rows <= 64 else 8),
        num_sms,
    )


def _split(case: Case, choice: Choice, num_sms: int) -> Choice:
    """Split the inputs over programs, up to two programs per multiprocessor, with at least 512
    inputs each."""
    programs = -(-case.outs // choice.block_n) * -(-case.rows // choice.block_m)
    split = 1
    while (
        split < 16 and programs * split * 2 <= 2 * num_sms and case.in_features >= 512 * split * 2
    ):
        split *= 2
    return Choice(**{**asdict(choice), "split_k": split})


def _without_rows(case: Case) -> tuple[object, ...]:
    return case.codes, case.inputs, case.group_size, case.outs, case.in_features


def _from_entry(kind: type[Any], entry: Mapping[str, Any]) -> Any:
    return kind(**{field.name: entry[field.name] for field in fields(kind)})
