"""Provide pytest fixtures: an environment in which the plugin of the simulated worker is installed,
and a model for it.

A conftest.py imports them: `from dovetail_testing.fixtures import model, simulated`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dovetail_testing.plugin import install, make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install the simulated plugin for this process and its child processes."""
    site = tmp_path / "site"
    install(site)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    )
    monkeypatch.syspath_prepend(site)
    yield site
    assert str(site) in sys.path
