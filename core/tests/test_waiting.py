"""What OpenMP's library is told about waiting, when, and for how long."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from dovetail.native import waiting
from dovetail.native.waiting import OF_USERS, SPIN_COUNT, VARIABLE, bounded_spinning, spin_variables


def test_it_is_told() -> None:
    assert spin_variables({}) == {VARIABLE: str(SPIN_COUNT)}


@pytest.mark.parametrize("name", OF_USERS)
def test_what_a_user_has_set_stays(name: str) -> None:
    assert spin_variables({name: "5"}) == {}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing is set, and no library is there."""
    for name in OF_USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(waiting, "_is_loaded", lambda: False)
    return monkeypatch


def test_the_environment_is_as_before_afterwards(environment: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    with bounded_spinning():
        assert os.environ == before | {VARIABLE: str(SPIN_COUNT)}
        with bounded_spinning():
            assert os.environ[VARIABLE] == str(SPIN_COUNT)
        assert VARIABLE in os.environ
    assert os.environ == before
    with pytest.raises(KeyError), bounded_spinning():
        raise KeyError
    assert os.environ == before


def test_a_library_that_is_there_is_said(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environment.setattr(waiting, "_is_loaded", lambda: True)
    with caplog.at_level(logging.INFO), bounded_spinning():
        assert VARIABLE not in os.environ
    assert f"set {VARIABLE} to change this" in caplog.text
    environment.setenv(VARIABLE, "7")
    caplog.clear()
    with caplog.at_level(logging.INFO), bounded_spinning():
        assert os.environ[VARIABLE] == "7"
    assert not caplog.text


def test_a_library_is_found_where_it_is_mapped(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    assert not waiting._is_loaded(maps)
    maps.write_text("7f00-7f01 r-xp 00000000 fe:00 1 /usr/lib/libc.so.6\n")
    assert not waiting._is_loaded(maps)
    maps.write_text("7f00-7f01 r-xp 00000000 fe:00 1 /usr/lib/torch/lib/libgomp-a34b3233.so.1\n")
    assert waiting._is_loaded(maps)
