"""Packages from outside: built into wheels, laid out as pip would, and used without being known to anyone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def site_of(name: str, out: Path) -> Path:
    """A folder with the contents of an example's wheel, as pip would lay them out."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=EXAMPLES / name, check=True, capture_output=True)
    site = out / "site"
    zipfile.ZipFile(next(out.glob("*.whl"))).extractall(site)
    return site


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the package is installed."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=250, cwd=site)


def conform(name: str, site: Path) -> None:
    """The package's own tests pass."""
    out = run(site, "-m", "pytest", "-p", "no:cacheprovider", str(EXAMPLES / name / "tests"), "--rootdir", str(site))
    assert out.returncode == 0, out.stdout[-3000:]
    assert " passed" in out.stdout


def imports_of(name: str) -> set[str]:
    """Top-level modules that a package imports, its own aside. Fails if it sets anything on what it imported."""
    found: set[str] = set()
    for path in (EXAMPLES / name / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                found |= {(module or alias.name).split(".")[0] for alias in node.names}
                imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Name) and node.id in ("setattr", "delattr")), f"{path} patches"
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute | ast.Subscript):
                    root = target.value
                    while isinstance(root, ast.Attribute | ast.Subscript):
                        root = root.value
                    assert not (isinstance(root, ast.Name) and root.id in imported), f"{path} patches {ast.unparse(target)}"
    return found - {f"dovetail_{name}"} - set(sys.stdlib_module_names)
