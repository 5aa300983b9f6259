"""The public API as stub files, and what breaks it.

Usage: python tests/api.py    (at a release: makes today's the baseline)

The baseline, tests/public_api/, has of every module that a plugin may use the names, signatures and
fields, and nothing else. What is added to the code breaks nobody. What is removed or changed is
found by griffe, and must be announced: CHANGELOG.md, section "Breaking", by its path in backticks.
"""

from __future__ import annotations

import ast
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
SOURCES = {
    "dovetail": ROOT / "core/src/dovetail",
    "dovetail_testing": ROOT / "kit/src/dovetail_testing",
}
BASELINE = ROOT / "tests/public_api"
PUBLIC = (
    "__init__",
    "errors",
    "plan",
    "sequence",
    "types",
    "facts/__init__",
    "facts/device",
    "facts/gpus",
    "facts/model",
    "interfaces/*",
    "native/*",
    "frontend/*",
    "cli/arguments",
    "composition/models",
    "runtime/llm",
    "runtime/serving",
    *(
        f"plugin/{name}"
        for name in (
            "build_context",
            "config",
            "contracts",
            "extension_points",
            "hookspecs",
            "provider",
        )
    ),
)
KIT = (
    "__init__",
    "architecture",
    "attention",
    "contract",
    "drafter",
    "fixtures",
    "kv_cache",
    "matmul",
    "model",
    "plugin",
    "prefix_cache",
    "quantization",
    "scheduler",
    "server",
    "simulated",
    "worker",
)
PATTERNS = {"dovetail": PUBLIC, "dovetail_testing": KIT}


def write_stubs(sources: Mapping[str, Path], out: Path) -> None:
    """Stubs of the packages' public modules, as `out/PACKAGE/…`. `sources`: the folder of each
    package."""
    shutil.rmtree(out, ignore_errors=True)
    for package, source in sources.items():
        for path in sorted(
            path for pattern in PATTERNS[package] for path in source.glob(f"{pattern}.py")
        ):
            target = out / package / path.relative_to(source)
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
            case ast.Assign(targets=[ast.Name(id=name)]) if (
                not name.startswith("_") or name == "__all__"
            ):
                kept.append(node)
            case ast.ClassDef(name=name) if not name.startswith("_"):
                node.body = _kept(node.body) or [ast.Expr(ast.Constant(...))]
                kept.append(node)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if (
                not name.startswith("_") or name == "__init__"
            ):
                node.body = [ast.Expr(ast.Constant(...))]
                kept.append(node)
    return kept


def breakages(old: Path, new: Path) -> Iterator[tuple[str, str]]:
    """(path of what is concerned, what happened to it), between two folders of stubs."""
    for package in PATTERNS:
        loaded = [
            griffe.load(package, search_paths=[str(p)], resolve_aliases=False) for p in (old, new)
        ]
        for breakage in griffe.find_breaking_changes(*loaded):
            said = breakage.explain(griffe.ExplanationStyle.ONE_LINE)
            yield breakage.obj.path, re.sub(r"\x1b\[[0-9;]*m", "", said)


def announced(changelog: str) -> set[str]:
    """Paths in backticks of the sections "Breaking"."""
    sections = re.findall(r"^### Breaking\n(.*?)(?=^##|\Z)", changelog, re.M | re.S)
    return {
        path
        for section in sections
        for path in re.findall(r"`(dovetail(?:_testing)?\.[\w.]+)`", section)
    }


def unannounced(old: Path, sources: Mapping[str, Path], changelog: str) -> list[str]:
    """Every break of the baseline that the changelog does not mention."""
    with tempfile.TemporaryDirectory() as folder:
        write_stubs(sources, Path(folder))
        known = announced(changelog)
        return [
            said
            for path, said in breakages(old, Path(folder))
            if not any(f"{path}.".startswith(f"{k}.") for k in known)
        ]


if __name__ == "__main__":
    write_stubs(SOURCES, BASELINE)
