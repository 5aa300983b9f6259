from __future__ import annotations
import os
import stat
from pathlib import Path
from dovetail.errors import PluginError
FOLDER_MODE = 448
SHARED = 'is writable by'
UNMAPPED = 65534

def private_folder(name: str, folder: Path) -> Path:
    ...

def why_not_ours(path: Path) -> str | None:
    ...
