"""A lock is the same bytes for the same composition, and says exactly what is not the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.composition.lock import check_lock, drift, encode, make_lock, read_lock
from dovetail.composition.resolution import resolve
from dovetail.errors import ConfigError
from dovetail.plugin.config import load_config
from dovetail.plugin.discovery import load_registry
from dovetail_testing.plugin import SIMULATED, install, make_model

PLUGIN = """from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Provider, SchedulerOptions
@hookimpl
def dovetail_schedulers(): return [Provider("mine", "a scheduler to lock", print, SchedulerOptions)]
"""


def locked(model: Path, **values: Any) -> dict[str, Any]:
    registry = load_registry()
    plan = resolve(load_config(model=str(model), **SIMULATED, **values), registry)
    return json.loads(encode(make_lock(plan, registry)))


@pytest.fixture
def mine(simulated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A third-party package, installed."""
    package = simulated / "mine_plugin"
    package.mkdir()
    (package / "__init__.py").write_text(PLUGIN)
    (package / "data.txt").write_text("one")
    install(simulated, "mine_plugin", "mine")
    monkeypatch.delitem(sys.modules, "mine_plugin", raising=False)
    return simulated


def test_the_same_composition_has_the_same_bytes(model: Path, mine: Path) -> None:
    registry = load_registry()
    texts = set()
    for _ in range(3):
        plan = resolve(load_config(model=str(model), scheduler="mine", **SIMULATED), registry)
        texts.add(encode(make_lock(plan, registry)))
    (text,) = texts
    assert str(mine) not in text, "a lock holds no path of this machine"
    assert {"dovetail-core", "dovetail-mine", "dovetail-simulated"} <= set(
        json.loads(text)["distributions"]
    )


def test_every_kind_of_drift_is_named(model: Path, mine: Path) -> None:
    before = locked(model, scheduler="mine")
    assert drift(before, locked(model, scheduler="mine")) == []

    (lines,) = [drift(before, locked(model, scheduler={"use": "mine", "max_num_seqs": 3}))]
    assert lines == ["choices.scheduler.options.max_num_seqs: 256 → 3"]

    assert 'choices.scheduler.provider: "mine" → "fcfs"' in drift(
        before, locked(model, scheduler="fcfs")
    )

    (mine / "mine_plugin/data.txt").write_text("two")
    (line,) = drift(before, locked(model, scheduler="mine"))
    assert line.startswith("distributions.dovetail-mine.sha256:")
    (mine / "mine_plugin/data.txt").write_text("one")
    assert drift(before, locked(model, scheduler="mine")) == []

    metadata = mine / "dovetail_mine-0.1.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 0.1.0", "Version: 0.2.0"))
    places = [line.split(":")[0] for line in drift(before, locked(model, scheduler="mine"))]
    assert places == ["choices.scheduler.version", "distributions.dovetail-mine.version"]
    metadata.write_text(metadata.read_text().replace("Version: 0.2.0", "Version: 0.1.0"))

    config = model / "tokenizer.json"
    config.write_text(config.read_text() + " ")
    (line,) = drift(before, locked(model, scheduler="mine"))
    assert line.startswith("model.files.tokenizer.json")


def test_another_machine_is_drift(model: Path, simulated: Path, tmp_path: Path) -> None:
    lock = locked(model)
    lock["hardware"]["cpu_flags"] += ["amx_int9"]
    lock["hardware"]["num_gpus"] += 1
    path = tmp_path / "engine.lock"
    path.write_text(encode(lock))
    registry = load_registry()
    plan = resolve(load_config(model=str(model), **SIMULATED), registry)
    with pytest.raises(ConfigError, match=r"hardware\.num_gpus: 1 → 0") as e:
        check_lock(path, plan, registry)
    assert "hardware.cpu_flags: missing: amx_int9" in e.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a lock file"),
        ("[]", "not a lock of version"),
        ('{"lock": 99}', "create it again"),
        (None, "cannot read"),
    ],
)
def test_what_is_no_lock_is_said(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.lock"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_lock(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values, values)
def test_there_is_drift_exactly_where_there_is_a_difference(a: Any, b: Any) -> None:
    # As JSON has it: True is not 1.
    assert bool(drift(a, b)) == (a != b) or json.dumps(a) != json.dumps(b)
    assert drift(a, a) == []


def cli(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dovetail.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ, timeout=60
    )


def test_the_command_writes_and_refuses(simulated: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "engine.yaml").write_text("model: model\nworker: simulated\nattention: simulated\n")
    assert cli("lock", "engine.yaml", folder=tmp_path).returncode == 0
    first = (tmp_path / "engine.lock").read_bytes()
    assert cli("lock", "engine.yaml", "-o", "again.lock", folder=tmp_path).returncode == 0
    assert (tmp_path / "again.lock").read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} >= {"engine.lock", "again.lock"}
    run = (
        "generate",
        "hello",
        "--max-tokens",
        "3",
        "--config",
        "engine.yaml",
        "--locked",
        "engine.lock",
    )
    good = cli(*run, folder=tmp_path)
    assert good.returncode == 0, good.stderr
    bad = cli(*run, "--max-num-seqs", "7", folder=tmp_path)
    assert bad.returncode == 2
    assert "choices.scheduler.options.max_num_seqs: 256 → 7" in bad.stderr
    assert bad.stdout == ""
