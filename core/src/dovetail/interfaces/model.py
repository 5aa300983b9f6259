"""Define what a model provider returns: the location of a model's files. A model provider is
selected by name, such as `demo`."""

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
    """Name of the draft model that belongs to this model, if there is one."""
    revision: str | None = None
    """Commit of the model, if the folder is a download from the hub."""
