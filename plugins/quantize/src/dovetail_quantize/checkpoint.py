"""Read tensors of a model folder by name, on demand. Nothing is ever unpickled."""

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
    """The safetensors files of a model folder. Raises `CheckpointError`, which names the file, if
    one is missing or malformed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        """File name of each tensor."""
        if (folder / INDEX).is_file():
            weight_map = read_json(folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(f, str) for f in weight_map.values()
            ):
                raise CheckpointError(
                    f"{folder / INDEX}: weight_map must map each tensor to a file"
                )
            self.files = dict(weight_map)
        elif (folder / SINGLE).is_file():
            with self._open(SINGLE) as file:
                self.files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise CheckpointError(f"{folder} has no weights: expected {SINGLE} or {INDEX}")

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Return copies of tensors as they are stored."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise CheckpointError(
                    f"{self.folder}: the tensor {name} is missing, but the model described by"
                    " config.json needs it"
                )
            by_file.setdefault(self.files[name], []).append(name)
        result = {}
        for file, wanted_names in by_file.items():
            with self._open(file) as opened:
                for name in wanted_names:
                    with self._name_file_in_errors(file):
                        result[name] = opened.get_tensor(name).clone()
        return result

    def sizes(self) -> dict[str, int]:
        """Return the number of bytes of each tensor in its file."""
        result = {}
        for file in sorted(set(self.files.values())):
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    part = opened.get_slice(name)
                    count = 1
                    for n in part.get_shape():
                        count *= n
                    result[name] = count * _BYTES.get(part.get_dtype(), 4)
        return result

    def identity(self) -> dict[str, list[int]]:
        """Return size and modification time of each file, to detect whether the folder has
        changed."""
        stats = {
            file: (self.folder / file).stat()
            for file in sorted({*self.files.values(), "config.json"})
        }
        return {file: [s.st_size, s.st_mtime_ns] for file, s in stats.items()}

    def _open(self, file: str) -> Any:
        with self._name_file_in_errors(file):
            return safe_open(self.folder / file, framework="pt", device="cpu")

    @contextlib.contextmanager
    def _name_file_in_errors(self, file: str) -> Any:
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
"""Bytes per element by safetensors type name; other types have 4."""


def as_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
