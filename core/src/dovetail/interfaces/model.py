"""Where a model's files are. A model provider answers to a name, such as `demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelSource:
    """A folder with config.json, safetensors and a tokenizer, in the layout of the Hugging Face
    hub."""

    folder: Path
    licence: str = ""
    draft: str | None = None
    """Name of the model that drafts for it, where one comes with it."""
    revision: str | None = None
    """Commit, where the folder is a download from the hub."""
