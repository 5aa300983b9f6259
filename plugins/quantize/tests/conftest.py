"""Provide a tiny model and a calibration text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dovetail_testing.tiny_model import TinyModel


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = TinyModel(random.randrange(2**31)).write(tmp_path_factory.mktemp("tiny"))
    (found / "generation_config.json").write_text('{"eos_token_id": 1}')
    (found / "chat_template.jinja").write_text("{{ messages }}")
    return found


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["".join(random.choices("abcdefghij", k=5)) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.choices(words, k=400)))
    return path
