from __future__ import annotations
import os
import sys
from collections.abc import Iterator
from pathlib import Path
import pytest
from dovetail_testing.plugin import install, make_model

@pytest.fixture
def model(tmp_path: Path) -> Path:
    ...

@pytest.fixture
def simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    ...
