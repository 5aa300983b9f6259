"""A model folder's tensors, read by name when they are asked for. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.facts import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """Raises `CheckpointError` that names the file, where one is missing or malformed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        """By tensor."""
        if (folder / INDEX).is_file():
            weight_map = read_json(folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(f, str) for f in weight_map.values()
            ):
                raise CheckpointError(
                    f"{folder / INDEX}: weight_map must say which file holds each tensor"
                )
            self.files = dict(weight_map)
        elif (folder / SINGLE).is_file():
            with self._open(SINGLE) as file:
                self.files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise CheckpointError(f"{folder} has no weights: expected {SINGLE} or {INDEX}")

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """As they are stored, in memory of their own."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise CheckpointError(
                    f"{self.folder} lacks {name}, which the model described by its config.json has"
                )
            by_file.setdefault(self.files[name], []).append(name)
        found = {}
        for file, wanted in by_file.items():
            with self._open(file) as opened:
                for name in wanted:
                    with self._naming(file):
                        found[name] = opened.get_tensor(name).clone()
        return found

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor in its file."""
        found = {}
        for file in sorted(set(self.files.values())):
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    part = opened.get_slice(name)
                    count = 1
                    for n in part.get_shape():
                        count *= n
                    found[name] = count * _BYTES.get(part.get_dtype(), 4)
        return found

    def identity(self) -> dict[str, list[int]]:
        """Size and time of change of each file: what tells one state of the folder from another."""
        stats = {
            file: (self.folder / file).stat()
            for file in sorted({*self.files.values(), "config.json"})
        }
        return {file: [s.st_size, s.st_mtime_ns] for file, s in stats.items()}

    def _open(self, file: str) -> Any:
        with self._naming(file):
            return safe_open(self.folder / file, framework="pt", device="cpu")

    @contextlib.contextmanager
    def _naming(self, file: str) -> Any:
        try:
            yield
        except (SafetensorError, OSError, ValueError) as e:
            raise CheckpointError(
                f"{self.folder / file} is missing, truncated or not a safetensors file: {e}"
            ) from None


_BYTES = {
    "F64": 8,
    "I64": 8,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""By safetensors' names of types; the others have 4."""


def as_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
