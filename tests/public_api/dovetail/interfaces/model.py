from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class ModelSource:
    folder: Path
    licence: str = ''
    draft: str | None = None
    revision: str | None = None
