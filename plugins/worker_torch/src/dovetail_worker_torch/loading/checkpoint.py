"""Safetensors into tensors that the model has allocated: memory-mapped, one copy, every mismatch an
error.

The files are `model.safetensors`, or several with `model.safetensors.index.json`. Nothing is ever
unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from dovetail.errors import CheckpointError
from dovetail.facts import read_json
from dovetail.interfaces.architecture import Target
from dovetail.interfaces.worker import Progress
from dovetail_worker_torch.runner.memory import give_back

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

INTERCHANGEABLE = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Types that are converted into each other on the way. Any other must be stored as the model wants
it."""

BY_CONFIG = Target._field_defaults["asked_by"]

PORTION = 256 * 2**20
"""Bytes of tensors that are read before memory is given back: so what is left over is bounded while
weights are read."""

IGNORABLE = ("*.rotary_emb.inv_freq",)
"""Tensors that old checkpoints hold and that follow from the config."""


def load_tensors(
    folder: Path, targets: Mapping[str, Target], *, progress: Progress, unused: Iterable[str] = ()
) -> None:
    """Fill each target from the tensor of its name. `unused`, globs: what may be there and is not
    read.

    Reports progress in bytes read. Raises `CheckpointError` naming the file if a file is missing or
    malformed, if a tensor is missing, has another shape or type, or is one that the model has no
    place for.
    """
    shards = [(path, names, open_shard(path)) for path, names in shard_files(folder).items()]
    total = sum(path.stat().st_size for path, _, _ in shards)
    surplus, missing, done, given_back = [], set(targets), 0, 0
    for path, names, shard in shards:
        stored = set(shard.keys())
        if absent := sorted((names or set()) - stored):
            raise CheckpointError(f"{path} does not hold {few(absent)}, although {INDEX} says so")
        # In the order of the file, so that the disk is read forwards.
        for name in shard.offset_keys():
            if names is not None and name not in names:
                continue
            if name not in targets:
                surplus.append(name)
                continue
            done += _copy(path, shard, name, targets[name])
            missing.discard(name)
            if done - given_back >= PORTION:
                give_back()
                given_back = done
            progress("loading weights", done, total)
    give_back()
    if missing:
        _refuse_missing(folder, targets, missing)
    allowed = [*IGNORABLE, *unused]
    if unknown := [n for n in surplus if not any(fnmatchcase(n, glob) for glob in allowed)]:
        raise CheckpointError(
            f"{folder} holds {few(unknown)}, which the model described by its config.json does not"
            " have"
        )
    progress("loading weights", total, total)


def shard_files(folder: Path) -> dict[Path, set[str] | None]:
    """The folder's weight files, each with the tensors that the index expects there (None: all that
    it holds).

    Raises `CheckpointError` if there are none, or only pickled ones, or if the index is broken or a
    file is missing.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map must say which file holds each tensor")
        shards: dict[Path, set[str] | None] = {}
        for name, file in weight_map.items():
            if (
                not isinstance(file, str)
                or Path(file).name != file
                or not file.endswith(".safetensors")
            ):
                raise CheckpointError(
                    f"{index}: {name} must be in a safetensors file of this folder, found {file!r}"
                )
            names = shards.setdefault(folder / file, set())
            assert names is not None
            names.add(name)
        if absent := sorted(path.name for path in shards if not path.is_file()):
            raise CheckpointError(
                f"{folder} lacks {few(absent)}, named by {INDEX}: was the download complete?"
            )
        return dict(sorted(shards.items()))
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if found := sorted(path.name for path in folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}, so {few(found)} cannot be told apart"
        )
    pickled = sorted(
        path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{suffix}")
    )
    if pickled:
        raise CheckpointError(
            f"{folder} has pickled weights only ({few(pickled)}). Unpickling runs code from the"
            " file, so they are not read: convert them to safetensors (transformers'"
            " save_pretrained writes it)"
        )
    raise CheckpointError(f"{folder} has no weights: expected {SINGLE} or {INDEX}")


def tensor_names(folder: Path) -> frozenset[str]:
    """Of all that a folder's weight files hold. Raises `CheckpointError`, as `shard_files` does."""
    shards = shard_files(folder).items()
    return frozenset(
        n for path, names in shards for n in (open_shard(path).keys() if names is None else names)
    )


def open_shard(path: Path) -> Any:
    """Open and check a safetensors file; its tensors are read when asked for. Raises
    `CheckpointError`."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {e}") from None


def _refuse_missing(folder: Path, targets: Mapping[str, Target], missing: set[str]) -> NoReturn:
    """Raise a `CheckpointError` about those tensors that the same thing asks for."""
    first = targets[min(missing)].asked_by
    alike = few(sorted(name for name in missing if targets[name].asked_by == first))
    if first == BY_CONFIG:
        raise CheckpointError(
            f"{folder} lacks {alike}, which the model described by its config.json has"
        )
    raise CheckpointError(f"{folder} lacks {alike}, which {first} asks for")


def _copy(path: Path, shard: Any, name: str, target: Target) -> int:
    """Copy one tensor; return its bytes in the file."""
    try:
        tensor = shard.get_tensor(
            name
        )  # a view of the mapped file: what stores it makes the only copy
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{path}: {name} cannot be read: {e}") from None
    if (
        tensor.numel() == 1 == math.prod(target.shape)
    ):  # a scale, by some tools stored with an axis, by others without
        tensor = tensor.reshape(target.shape)
    if tuple(tensor.shape) != target.shape:
        advice = (
            ""
            if target.asked_by == BY_CONFIG
            else ": is it the config that it was made with, and is the file whole?"
        )
        raise CheckpointError(
            f"{path}: {name} has shape {list(tensor.shape)}, {target.asked_by} asks for"
            f" {list(target.shape)}{advice}"
        )
    if tensor.dtype != target.dtype and not {tensor.dtype, target.dtype} <= INTERCHANGEABLE:
        stored, wanted = (str(t).removeprefix("torch.") for t in (tensor.dtype, target.dtype))
        raise CheckpointError(
            f"{path}: {name} is stored as {stored}, which cannot be loaded as {wanted}"
        )
    try:
        target.store(tensor)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e.message}", provider=e.provider) from None
    return int(tensor.nbytes)


def few(names: list[str]) -> str:
    """The first five, and how many more."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


class FolderWeights:
    """The weight files of a folder, for models: `WeightFiles`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self) -> int:
        files = list(shard_files(self._folder))
        for path in files:
            open_shard(path)
        return sum(path.stat().st_size for path in files)

    def are_equal(self, name: str, other: str) -> bool:
        found: dict[str, Any] = {}
        for path, names in shard_files(self._folder).items():
            shard = open_shard(path)
            held = set(shard.keys()) if names is None else names
            found |= {n: shard.get_tensor(n) for n in (name, other) if n in held}
        return len(found) == 2 and torch.equal(found[name], found[other])
