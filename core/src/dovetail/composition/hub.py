"""Models of the Hugging Face hub: what is downloaded of a repository, and which commit it is."""

from __future__ import annotations

import re
from pathlib import Path

from dovetail.errors import ConfigError

TAKEN = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
CODE = ("*.py",)
NOT_TAKEN = (
    "consolidated*",
    "original/*",  # Mistral's and Meta's own forms: all the weights once more
    "*/*.safetensors",  # of exports and training: an engine loads what lies beside config.json
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.tflite",
    "*.gguf",
)
"""Weights a second time, in forms that are not read, whatever `TAKEN` says."""


def download(name: str, where: str, *, with_code: bool, revision: str | None) -> Path:
    """Download what an engine reads of a repository, as far as it is not in the hub's cache, and
    return its folder there.

    `where` names the setting in errors; `revision` is a branch, a tag or a commit (None: the main
    branch). Code is left out unless `with_code`. Raises `ConfigError`.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{where}: {name!r} is a hub id, and huggingface_hub is not installed"
        ) from None
    taken = [*TAKEN, *(CODE if with_code else ())]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=taken, ignore_patterns=list(NOT_TAKEN)
            )
        )
    except Exception as e:
        at = f" at revision {revision!r}" if revision is not None else ""
        why = f"{type(e).__name__}: {e}"
        raise ConfigError(
            f"{where}: {name!r} is not a local path, and the download from the hub failed{at}:"
            f" {why}"
        ) from None


def commit_of(folder: Path) -> str | None:
    """Of a folder in the hub's cache, which ends in snapshots/COMMIT; None for any other folder."""
    return (
        folder.name
        if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
        else None
    )
