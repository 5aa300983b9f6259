"""Download models from the Hugging Face hub, and find out which commit a folder is."""

from __future__ import annotations

import re
from pathlib import Path

from dovetail.errors import ConfigError

INCLUDED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
CODE = ("*.py",)
EXCLUDED = (
    "consolidated*",
    "original/*",  # Mistral's and Meta's own formats: all weights a second time
    "*/*.safetensors",  # exports and training states: an engine loads what is beside config.json
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
"""Copies of the weights in formats that are not read, even if `INCLUDED` matches them."""


def download(name: str, where: str, *, with_code: bool, revision: str | None) -> Path:
    """Download the files of a repository that an engine reads, unless they are in the hub's cache,
    and return the folder in the cache.

    `where` names the setting in errors; `revision` is a branch, a tag or a commit (None: the main
    branch). Code is downloaded only with `with_code`. Raises `ConfigError`.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{where}: {name!r} is a hub id, but huggingface_hub is not installed"
        ) from None
    included = [*INCLUDED, *(CODE if with_code else ())]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=included, ignore_patterns=list(EXCLUDED)
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
    """Return the commit of a folder in the hub's cache, whose path ends in snapshots/COMMIT; None
    for any other folder."""
    return (
        folder.name
        if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
        else None
    )
