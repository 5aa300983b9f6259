"""Every package in examples/, installed and used as a stranger would: a wheel in a fresh environment, no configuration."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

EXAMPLES = sorted(p.parent for p in (Path(__file__).parents[1] / "examples").glob("*/pyproject.toml"))
PRIVATE = (
    "dovetail.engine", "dovetail.scheduler", "dovetail.kv_cache", "dovetail.builtins", "dovetail.engine_process",
    "dovetail.wire", "dovetail.plugins", "dovetail.cli",
)  # fmt: skip
"""Modules of the core that are no plugin's business (pyproject.toml holds our own plugins to the same)."""


@dataclass(frozen=True)
class Installed:
    """An example in an environment of its own."""

    source: Path
    python: Path
    folder: Path

    @property
    def distribution(self) -> str:
        name: str = tomllib.loads((self.source / "pyproject.toml").read_text())["project"]["name"]
        return name

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=self.folder)

    def dovetail(self, *arguments: str) -> str:
        out = self.run("-m", "dovetail.cli.main", *arguments)
        assert out.returncode == 0, out.stdout[-5000:] + out.stderr
        return out.stdout


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda p: p.name)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Its wheel, built and installed by pip into a new environment. Dependencies are those of this environment: a path file
    leads to them, so that nothing is fetched."""
    folder = tmp_path_factory.mktemp(request.param.name)
    python = folder / "venv/bin/python"
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv/lib").glob("python*")) / "site-packages"
    here = [p for p in sys.path if p.endswith("site-packages")]
    ahead = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and "examples" not in p]
    lines = [*ahead, *(f"import site; site.addsitedir({p!r})" for p in here)]
    (site / "dependencies.pth").write_text("\n".join(lines) + "\n")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=request.param, check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run([*install, "--disable-pip-version-check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Installed(request.param, python, folder)


def test_it_is_found(example: Installed) -> None:
    out = example.run("-m", "dovetail.cli.main", "plugins", "--json")
    (plugin,) = [p for p in json.loads(out.stdout) if p["distribution"] == example.distribution]
    assert plugin["broken"] is None
    assert plugin["offers"]
    assert example.distribution in example.dovetail("explain", str(example.source / "engine.yaml"))


def test_it_conforms(example: Installed) -> None:
    """Its own test, from its own folder, and a part of the same by the command."""
    out = example.run("-m", "pytest", "-p", "no:cacheprovider", str(example.source / "tests"), "--rootdir", str(example.folder))
    assert out.returncode == 0, out.stdout[-5000:]
    assert " passed" in out.stdout
    reports = json.loads(example.dovetail("conform", example.distribution, "--json", "-k", "declar or one or memory"))
    assert reports
    assert all(report["passed"] and report["checks"] for report in reports)


def test_an_engine_composed_by_a_file_runs_with_it(example: Installed) -> None:
    composition = example.source / "engine.yaml"
    arguments = ("generate", "import os", "--max-tokens", "12", "--dtype", "float32", "--device", "cpu")
    expected = example.dovetail(*arguments, "--model", "demo")
    assert example.dovetail(*arguments, "--config", str(composition)) == expected


def test_it_patches_nothing_and_imports_what_is_public(example: Installed) -> None:
    """No private name or module of the core, and no attribute of anything imported from it set."""
    for path in (example.source / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
                names = [a.name for a in node.names]
                modules = [module, *(f"{module}.{n}" for n in names)] if module else names
                ours = [m for m in modules if m.split(".")[0] == "dovetail"]
                assert not [m for m in ours if m.startswith(PRIVATE)], f"{path.name} imports {ours}"
                assert not [m for m in ours if any(part.startswith("_") for part in m.split("."))], f"{path.name}: {ours}"
                imported |= {(a.asname or a.name).split(".")[0] for a in node.names} if ours else set()
            if isinstance(node, ast.Name):
                assert node.id not in ("setattr", "delattr", "monkeypatch", "mock"), f"{path.name} uses {node.id}"
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                owner = node.value
                while isinstance(owner, ast.Attribute):
                    owner = owner.value
                assert not (isinstance(owner, ast.Name) and owner.id in imported), f"{path.name} sets {ast.unparse(node)}"


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
