"""The folder that is being made: whole files only, and what a killed run needs to go on.

While the work lasts there is no config.json, so that nobody loads half a model. Every file is
written under another name and then renamed. The state says how many layers are finished; with it
lie the hidden states that the next layer is given.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dovetail.errors import ConfigError
from dovetail.facts import read_json

STATE, PARTIAL = ".dovetail-quantize.json", ".partial"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "additional_chat_templates/*.jinja")
NOT_COPIED = ("config.json", "model.safetensors.index.json")


def files_to_copy(source: Path) -> list[Path]:
    """Of a model folder, what `OutputFolder.copy_from` takes. Raises `ConfigError` for a link to
    what is no part of a model: the copy, which may be published, would hold it. Snapshots in the
    hub's cache consist of links, to blobs in there."""
    home = source.resolve()
    homes = [home]
    if (
        home.parent.name == "snapshots"
    ):  # CACHE/models--OWNER--NAME/snapshots/COMMIT; blobs lie in CACHE/…/blobs or CACHE/blobs
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    matches = [file for pattern in COPIED for file in sorted(source.glob(pattern))]
    found = [file for file in matches if file.name not in NOT_COPIED and file.is_file()]
    for file in found:
        target = file.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise ConfigError(
                f"{file} is a link to {target}, outside the model: if it is meant, put a copy there"
                " instead"
            )
    return found


class OutputFolder:
    """Raises `ConfigError` for a folder that holds something else, and when the disk is too small
    or full."""

    def __init__(self, path: Path, settings: Mapping[str, Any], num_bytes: int) -> None:
        self.path, self._settings, self._num_bytes = path, dict(settings), num_bytes
        self.rows: list[dict[str, Any]] = []
        """What the report says of each layer that is finished."""
        self._take_up()
        self._check_space()
        self._attempt(lambda: path.mkdir(parents=True, exist_ok=True), path)
        if not self._has_state:
            self._write_state()

    def streams(self) -> dict[str, Tensor]:
        """What `finish_layer` was given with the last layer that is finished."""
        return load_file(self._streams(len(self.rows)))

    def begin(self, streams: Mapping[str, Tensor]) -> None:
        """Before the first layer."""
        self._write_tensors(self._streams(0), streams)

    def finish_layer(
        self,
        file: str,
        tensors: Mapping[str, Tensor],
        row: dict[str, Any],
        streams: Mapping[str, Tensor],
    ) -> None:
        self.write_tensors(file, tensors)
        done = len(self.rows) + 1
        self._write_tensors(self._streams(done), streams)
        self.rows.append(row)
        self._write_state()
        self._streams(done - 1).unlink(missing_ok=True)

    def finish(self, config: dict[str, Any]) -> None:
        """The model's config.json, and with it the folder is a checkpoint."""
        self.write_text("config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        (self.path / STATE).unlink()
        self._streams(len(self.rows)).unlink(missing_ok=True)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._write_tensors(self.path / name, tensors)

    def write_text(self, name: str, text: str) -> None:
        self._write(self.path / name, lambda partial: partial.write_text(text, encoding="utf-8"))

    def write_with(self, name: str, write: Callable[[Path], object]) -> None:
        """`write` makes the file at the path that it is given, which has the name's suffix."""
        self._write(self.path / name, write)

    def copy_from(self, source: Path) -> None:
        """Tokenizer, chat templates, generation_config, licence."""
        for file in files_to_copy(source):
            target = self.path / file.relative_to(source)
            self._attempt(lambda t=target: t.parent.mkdir(exist_ok=True), target)  # type: ignore[misc]
            self._write(target, lambda partial, f=file: shutil.copyfile(f, partial))  # type: ignore[misc]

    def size(self) -> int:
        """Bytes of the weights that are there."""
        return sum(file.stat().st_size for file in self.path.glob("model-*.safetensors"))

    @property
    def _has_state(self) -> bool:
        return (self.path / STATE).is_file()

    def _take_up(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a file: name a folder")
        if not self._has_state:
            found = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
            # A run that was killed before anything else leaves no more than its state,
            # half-written.
            if found and found != [Path(STATE).stem + PARTIAL + Path(STATE).suffix]:
                raise ConfigError(
                    f"--out {self.path} is not empty ({', '.join(found[:3])}, …): name a new folder"
                )
            return
        state = read_json(self.path / STATE)
        before = state.get("settings", {})
        changed = [
            k for k in {**before, **self._settings} if before.get(k) != self._settings.get(k)
        ]
        if changed:
            listing = "; ".join(
                f"{k}: {before.get(k)!r} there, {self._settings.get(k)!r} now" for k in changed
            )
            raise ConfigError(
                f"--out {self.path} holds an interrupted run that was another one ({listing}):"
                " repeat that command to finish it, or name another folder"
            )
        self.rows = state["layers"]
        for left in self.path.glob(f"*{PARTIAL}*"):
            left.unlink()

    def _check_space(self) -> None:
        there = next(p for p in (self.path, *self.path.resolve().parents) if p.exists())
        free, missing = shutil.disk_usage(there).free, self._num_bytes - self._written()
        if free < missing:
            raise ConfigError(
                f"--out {self.path}: the disk has {_mb(free)} free, and {_mb(missing)} are needed"
            )

    def _written(self) -> int:
        return (
            sum(f.stat().st_size for f in self.path.glob("**/*") if f.is_file())
            if self.path.is_dir()
            else 0
        )

    def _streams(self, done: int) -> Path:
        return self.path / f".dovetail-quantize-{done:05d}.safetensors"

    def _write_state(self) -> None:
        text = json.dumps({"settings": self._settings, "layers": self.rows}, indent=1)
        self._write(self.path / STATE, lambda partial: partial.write_text(text, encoding="utf-8"))

    def _write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        made = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._write(path, lambda partial: save_file(made, partial, metadata={"format": "pt"}))

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        partial = path.with_name(f"{path.stem}{PARTIAL}{path.suffix}")

        def write_whole() -> None:
            partial.touch()
            mode = partial.stat().st_mode  # that of new files here; safetensors has its own idea
            write(partial)
            partial.chmod(mode)
            partial.replace(path)

        try:
            self._attempt(write_whole, path)
        finally:
            partial.unlink(missing_ok=True)

    def _attempt(self, write: Callable[[], object], path: Path) -> None:
        try:
            write()
        except (OSError, SafetensorError) as e:
            full = getattr(e, "errno", None) == errno.ENOSPC or "os error 28" in str(e)
            if not full:
                raise ConfigError(f"--out: {path} cannot be written: {e}") from None
            missing = max(0, self._num_bytes - self._written())
            raise ConfigError(
                f"--out {self.path}: the disk is full, and {_mb(missing)} are still needed."
                f" {len(self.rows)} layers are finished and kept: make room and repeat the command"
                " to go on"
            ) from None


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
