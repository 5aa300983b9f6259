"""Write the output folder: complete files only, and the state from which an interrupted run
resumes.

The folder has no config.json until it is complete, so that nobody loads an incomplete model. Every
file is written under another name and then renamed. The state counts the finished layers; the
hidden states that the next layer takes are stored beside it.
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
    """Return the files of a model folder that `OutputFolder.copy_from` copies. Raises `ConfigError`
    for a link out of the model, because the output may be published and would contain the target.
    Snapshots in the hub's cache consist of links to the cache's blobs, which are allowed."""
    home = source.resolve()
    homes = [home]
    # CACHE/models--OWNER--NAME/snapshots/COMMIT; its blobs are in CACHE/…/blobs or CACHE/blobs.
    if home.parent.name == "snapshots":
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    matches = [file for pattern in COPIED for file in sorted(source.glob(pattern))]
    found = [file for file in matches if file.name not in NOT_COPIED and file.is_file()]
    for file in found:
        target = file.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise ConfigError(
                f"{file} is a link to {target}, outside the model: if this is intended, replace the"
                " link with a copy"
            )
    return found


class OutputFolder:
    """The output folder of one run, new or resumed. Raises `ConfigError` if the folder contains
    anything else, and if the disk is too small or full."""

    def __init__(self, path: Path, settings: Mapping[str, Any], num_bytes: int) -> None:
        self.path, self._settings, self._num_bytes = path, dict(settings), num_bytes
        self.rows: list[dict[str, Any]] = []
        """Rows of the report, one per finished layer."""
        self._resume()
        self._check_space()
        self._attempt(lambda: path.mkdir(parents=True, exist_ok=True), path)
        if not self._has_state:
            self._write_state()

    def streams(self) -> dict[str, Tensor]:
        """Return the hidden states after the last finished layer."""
        return load_file(self._streams(len(self.rows)))

    def begin(self, streams: Mapping[str, Tensor]) -> None:
        """Store the hidden states before the first layer."""
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
        """Write config.json, which completes the checkpoint, and delete the state."""
        self.write_text("config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        (self.path / STATE).unlink()
        self._streams(len(self.rows)).unlink(missing_ok=True)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._write_tensors(self.path / name, tensors)

    def write_text(self, name: str, text: str) -> None:
        self._write(self.path / name, lambda partial: partial.write_text(text, encoding="utf-8"))

    def write_with(self, name: str, write: Callable[[Path], object]) -> None:
        """Call `write` with a temporary path that has the suffix of `name`, then rename the
        file."""
        self._write(self.path / name, write)

    def copy_from(self, source: Path) -> None:
        """Copy tokenizer, chat templates, generation_config and licence."""
        for file in files_to_copy(source):
            target = self.path / file.relative_to(source)
            self._attempt(lambda t=target: t.parent.mkdir(exist_ok=True), target)  # type: ignore[misc]
            self._write(target, lambda partial, f=file: shutil.copyfile(f, partial))  # type: ignore[misc]

    def size(self) -> int:
        """Return the number of bytes of the weight files written so far."""
        return sum(file.stat().st_size for file in self.path.glob("model-*.safetensors"))

    @property
    def _has_state(self) -> bool:
        return (self.path / STATE).is_file()

    def _resume(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a file: specify a folder")
        if not self._has_state:
            found = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
            # A run that was killed at the very beginning leaves only its partially written state.
            if found and found != [Path(STATE).stem + PARTIAL + Path(STATE).suffix]:
                raise ConfigError(
                    f"--out {self.path} is not empty ({', '.join(found[:3])}, …): specify a new"
                    " folder"
                )
            return
        state = read_json(self.path / STATE)
        before = state.get("settings", {})
        changed = [
            k for k in {**before, **self._settings} if before.get(k) != self._settings.get(k)
        ]
        if changed:
            listing = "; ".join(
                f"{k}: was {before.get(k)!r}, is {self._settings.get(k)!r}" for k in changed
            )
            raise ConfigError(
                f"--out {self.path} contains an interrupted run with other settings ({listing}):"
                " repeat that command to finish it, or specify another folder"
            )
        self.rows = state["layers"]
        for left in self.path.glob(f"*{PARTIAL}*"):
            left.unlink()

    def _check_space(self) -> None:
        existing = next(p for p in (self.path, *self.path.resolve().parents) if p.exists())
        free, missing = shutil.disk_usage(existing).free, self._num_bytes - self._written()
        if free < missing:
            raise ConfigError(
                f"--out {self.path}: the disk has {_mb(free)} free, but {_mb(missing)} are needed"
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
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._write(path, lambda partial: save_file(contiguous, partial, metadata={"format": "pt"}))

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        partial = path.with_name(f"{path.stem}{PARTIAL}{path.suffix}")

        def write_whole() -> None:
            partial.touch()
            mode = partial.stat().st_mode  # safetensors sets another mode than new files have here
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
                f" {len(self.rows)} layers are finished and kept: free some space and repeat the"
                " command to resume"
            ) from None


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
