"""The public API as stub files, and what breaks it.  Usage: python tests/api.py   (at a release: makes today's the baseline)

The baseline, tests/public_api/, has of every module that a plugin may use the names, signatures and fields, and nothing else.
What is added to the code breaks nobody. What is removed or changed is found by griffe, and must be announced: CHANGELOG.md,
section "Breaking", by its path in backticks.
"""

from __future__ import annotations

import ast
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "core/src/dovetail"
BASELINE = ROOT / "tests/public_api"
PUBLIC = (
    "__init__", "compose", "config", "contracts", "errors", "facts", "hookspecs", "llm", "plan", "provider", "sequence",
    "serving", "sockets", "types", "interfaces/*", "native/*",
    *(f"testing/{name}" for name in (
        "__init__", "architecture", "attention", "contract", "drafter", "kv_cache", "model", "plugin", "prefix_cache",
        "quantization", "scheduler", "server", "simulated", "worker",
    )),
)  # fmt: skip


def write_stubs(source: Path, out: Path) -> None:
    """Stubs of the package's public modules, as `out/dovetail/…`."""
    shutil.rmtree(out, ignore_errors=True)
    for pattern in PUBLIC:
        for path in sorted(source.glob(f"{pattern}.py")):
            target = out / "dovetail" / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(stub(path.read_text()))
            for folder in target.relative_to(out).parents[:-1]:
                (out / folder / "__init__.py").touch()


def stub(source: str) -> str:
    """Names, signatures and fields."""
    module = ast.parse(source)
    module.body = _kept(module.body)
    return ast.unparse(module) + "\n"


def _kept(body: list[ast.stmt]) -> list[ast.stmt]:
    kept: list[ast.stmt] = []
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.If() | ast.Try():
                kept.append(node)
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                kept.append(node)
            case ast.Assign(targets=[ast.Name(id=name)]) if not name.startswith("_") or name == "__all__":
                kept.append(node)
            case ast.ClassDef(name=name) if not name.startswith("_"):
                node.body = _kept(node.body) or [ast.Expr(ast.Constant(...))]
                kept.append(node)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if not name.startswith("_") or name == "__init__":
                node.body = [ast.Expr(ast.Constant(...))]
                kept.append(node)
    return kept


def breakages(old: Path, new: Path) -> Iterator[tuple[str, str]]:
    """(path of what is concerned, what happened to it), between two folders of stubs."""
    loaded = [griffe.load("dovetail", search_paths=[str(p)], resolve_aliases=False) for p in (old, new)]
    for breakage in griffe.find_breaking_changes(*loaded):
        said = breakage.explain(griffe.ExplanationStyle.ONE_LINE)
        yield breakage.obj.path, re.sub(r"\x1b\[[0-9;]*m", "", said)


def announced(changelog: str) -> set[str]:
    """Paths in backticks of the sections "Breaking"."""
    sections = re.findall(r"^### Breaking\n(.*?)(?=^##|\Z)", changelog, re.M | re.S)
    return {path for section in sections for path in re.findall(r"`(dovetail\.[\w.]+)`", section)}


def unannounced(old: Path, source: Path, changelog: str) -> list[str]:
    """Every break of the baseline that the changelog does not mention."""
    with tempfile.TemporaryDirectory() as folder:
        write_stubs(source, Path(folder))
        known = announced(changelog)
        return [said for path, said in breakages(old, Path(folder)) if not any(f"{path}.".startswith(f"{k}.") for k in known)]


if __name__ == "__main__":
    write_stubs(SOURCE, BASELINE)
