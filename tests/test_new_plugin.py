"""`dovetail new-plugin`: what it writes installs, is found, keeps its contract and runs; what
cannot be is refused."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from third_party import A_SLICE, Environment

from dovetail.cli.main import main
from dovetail.composition.resolution import resolve
from dovetail.plugin.config import EngineConfig
from dovetail.plugin.discovery import load_registry
from dovetail_testing.scaffold import new_plugin

ROOT = Path(__file__).parents[1]
REGISTRY = load_registry()
EXTENSION_POINTS = list(REGISTRY.extension_points)
MOST_LINES = 240
"""Of a file that is to be read before it is changed."""
GENERATED = ["generate", "import os", "--max-tokens", "8", "--dtype", "float32", "--device", "cpu"]
OWN_TEXT = ("model", "quantization", "matmul")
"""Packages with which the text is another one: they change the weights, or ask for some that are
quantized."""


def name_of(extension_point: str) -> str:
    return f"third_party_{extension_point}"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One package for each extension point."""
    folder = tmp_path_factory.mktemp("new")
    return {s: new_plugin(REGISTRY, s, name_of(s), folder / name_of(s)) for s in EXTENSION_POINTS}


@pytest.fixture(scope="module")
def installed(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """All of them, as wheels in a fresh environment."""
    environment = Environment.make(tmp_path_factory.mktemp("fresh") / "venv")
    environment.install(*packages.values())
    return environment


def test_there_is_a_template_for_every_extension_point(packages: dict[str, Path]) -> None:
    assert {"attention", "worker", "server", "eviction", "routes"} <= set(packages)


def test_all_are_found_and_none_takes_over(installed: Environment) -> None:
    """Each is named by `plugins`, and by `explain` as what could be had: taken is what is taken
    without them."""
    plugins, plan = installed.dovetails(("plugins", "--json"), ("explain", "--json"))
    offers = {
        o["extension_point"]: p
        for p in json.loads(plugins)
        if p["name"].startswith("third-party-")
        for o in p["offers"]
    }
    assert set(offers) == set(EXTENSION_POINTS)
    assert not [p for p in offers.values() if p["broken"]]
    choices = json.loads(plan)["choices"]
    taken = {
        key: c["provider"] for key, c in choices.items() if c["extension_point"] != "routes"
    }  # routes are all taken
    assert taken == {
        key: c.provider for key, c in resolve(EngineConfig(), server=True).choices.items()
    }
    rejected = {
        c["extension_point"]
        for c in choices.values()
        for r in c["rejected"]
        if r["provider"].startswith("third-party")
    }
    assert rejected == set(EXTENSION_POINTS) - {
        "routes",
        "matmul",
    }  # plain weights need nobody who multiplies by quantized ones


def test_their_own_tests_pass(packages: dict[str, Path], installed: Environment) -> None:
    """All of them; but for the soak, the one check that takes longer than the others together."""
    slow = () if "DOVETAIL_SOAK" in os.environ else ("-k", "not draws_follow_the_distribution")
    assert "passed" in installed.test(*(p / "tests" for p in packages.values()), arguments=slow)


def test_conform_and_explain_name_them(packages: dict[str, Path], installed: Environment) -> None:
    names = {s: name_of(s).replace("_", "-") for s in EXTENSION_POINTS}
    reports = installed.dovetails(
        *(("conform", name, "--json", "-k", A_SLICE) for name in names.values())
    )
    for extension_point, report in zip(names, map(json.loads, reports), strict=True):
        (only,) = report
        assert (only["extension_point"], only["provider"], only["passed"]) == (
            extension_point,
            names[extension_point],
            True,
        )
        assert any(check["outcome"] == "passed" for check in only["checks"]), extension_point
        assert only["contract"] == REGISTRY.extension_points[extension_point].contract
    plans = installed.dovetails(
        *(("explain", str(packages[s] / "engine.yaml"), "--json") for s in EXTENSION_POINTS)
    )
    for extension_point, plan in zip(EXTENSION_POINTS, map(json.loads, plans), strict=True):
        assert [
            c
            for c in plan["choices"].values()
            if c["provider"] == names[extension_point] and c["extension_point"] == extension_point
        ]


def test_engines_run_with_them(packages: dict[str, Path], installed: Environment) -> None:
    """Each by its own engine.yaml; the text is the one without it, where it should be."""
    files = [packages[s] / "engine.yaml" for s in EXTENSION_POINTS]
    expected, *texts = installed.dovetails(
        (*GENERATED, "--model", "demo"), *((*GENERATED, "--config", str(file)) for file in files)
    )
    different = [s for s, text in zip(EXTENSION_POINTS, texts, strict=True) if text != expected]
    assert set(different) <= set(OWN_TEXT)
    assert "model" in different


def test_they_are_documented_typed_and_tidy(packages: dict[str, Path], tmp_path: Path) -> None:
    """Nothing of the template is left; each function and class says what it is or keeps a
    documented contract; ruff and mypy have nothing to say."""
    for extension_point, package in packages.items():
        texts = {
            p: p.read_text()
            for p in package.rglob("*")
            if p.suffix in (".py", ".toml", ".md", ".yaml")
        }
        assert len(texts) >= 5
        for path, text in texts.items():
            left = [word for word in ("my_plugin", "my-plugin", "MyPlugin", "THE_") if word in text]
            assert not left, f"{path}: {left}"
            assert len(text.splitlines()) <= MOST_LINES, path
            if path.suffix == ".py":
                assert len(ast.get_docstring(ast.parse(text)) or "") > 40, path
        assert f'{extension_point} = "v' in texts[package / "pyproject.toml"]
        assert 5 <= len(texts[package / "tests/test_conformance.py"].splitlines()) <= 20
    sources = [str(p / "src") for p in packages.values()]
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *sources],
        capture_output=True,
        text=True,
    )
    assert ruff.returncode == 0, ruff.stdout
    path = os.pathsep.join([str(ROOT / "core/src"), *sources])
    mypy = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--cache-dir",
            str(tmp_path),
            *(f"-p{name_of(s)}" for s in packages),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": path},
    )
    assert mypy.returncode == 0, mypy.stdout


@pytest.mark.parametrize(
    ("extension_point", "name", "said"),
    [
        (
            "attentoin",
            "mine",
            "'attentoin' is not an extension point; the extension points are model, quantization",
        ),
        ("attention", "My Backend", "is not a valid package name"),
        ("attention", "2fast", "is not a valid package name"),
        ("attention", "../mine", "is not a valid package name"),
        ("attention", "class", "is not a valid package name"),
        ("attention", "dovetail_core", "dovetail-core 0.1.0 is already installed"),
        ("attention", "json", "a module json already exists"),
        ("scheduler", "fcfs", "'fcfs' is a provider of scheduler (dovetail-core:fcfs)"),
        ("scheduler", "auto", "'auto' is a keyword of engine configs"),
    ],
)
def test_what_cannot_be_is_refused(
    extension_point: str, name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-plugin", extension_point, name, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_or_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert main(["new-plugin", "scheduler", "mine"]) == 2
    assert "mine already exists" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["new-plugin", "scheduler", "mine", "--out", "file/mine"]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "mine"]


def test_it_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", "attention", "my-backend"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "  pip install -e my_backend",
        "  dovetail conform my-backend",
        '  dovetail generate "import os" --config my_backend/engine.yaml',
    ]
    assert (tmp_path / "my_backend/src/my_backend/backend.py").is_file()
