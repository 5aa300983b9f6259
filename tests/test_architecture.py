"""The rules of the house, as tests: imports, sizes, names, documentation."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

import dovetail
from dovetail.plugin import hookspecs
from dovetail.plugin.discovery import load_registry
from dovetail.plugin.extension_points import EXTENSION_POINTS

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core/src/dovetail"
PLUGINS = sorted(p for p in (ROOT / "plugins").iterdir() if (p / "pyproject.toml").exists())
HEAVY = ("torch", "jax", "triton", "numpy", "transformers", "safetensors", "fastapi", "uvicorn")


def imported_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running some code."""
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys; print('@', *{{m.split('.')[0] for m in sys.modules}})",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(out.stdout.splitlines()[-1].split())


def test_every_core_module_imports_without_a_tensor_library() -> None:
    modules = [
        ".".join(("dovetail", *p.relative_to(CORE).with_suffix("").parts)).removesuffix(".__init__")
        for p in CORE.rglob("*.py")
        if all(
            (folder / "__init__.py").exists() for folder in p.parents if folder.is_relative_to(CORE)
        )  # no template's file
    ]
    assert {"dovetail.engine.engine", "dovetail.facts", "dovetail.cli.main"} <= set(modules)
    assert imported_after("\n".join(f"import {m}" for m in modules)).isdisjoint(HEAVY)


def test_composing_and_listing_import_no_tensor_library() -> None:
    """Not even with every plugin installed: their roots are light."""
    code = (
        "from dovetail.composition.resolution import resolve; from dovetail.plugin.config import"
        " EngineConfig\nfrom dovetail.cli.main import main\nresolve(EngineConfig(), server=True);"
        " main(['plugins']); main(['explain'])"
    )
    assert imported_after(code).isdisjoint(HEAVY)


def test_no_files_import_each_other_in_a_circle() -> None:
    """Not even for types alone."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "root_packages"
    ]
    graph = grimp.build_graph(*packages, cache_dir=None)
    sorter = TopologicalSorter(
        {m: graph.find_modules_directly_imported_by(m) - {m} for m in graph.modules}
    )
    sorter.prepare()  # raises CycleError, which names the files


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    source = path.read_text()
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    ignored = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - skipped)


def test_the_loop_stays_small() -> None:
    """DESIGN, rule 10: `engine/` holds everything the core runs in a step."""
    sizes = {p.name: code_lines(p) for p in (CORE / "engine").glob("*.py")}
    plain = ("engine", "decode", "scheduler", "kv_cache", "block_pool")
    plain_path = sum(sizes[f"{n}.py"] for n in plain)
    assert sum(sizes.values()) <= 1_700, sizes
    assert max(sizes.values()) <= 350, sizes
    assert plain_path + code_lines(CORE / "sequence.py") <= 750, sizes


def test_no_file_is_too_long() -> None:
    files = [
        p
        for part in ("core", "kit", "plugins", "tests", "benchmarks")
        for p in (ROOT / part).rglob("*.py")
    ]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert not {name: n for name, n in lengths.items() if n > 500}


def test_every_hook_is_documented_and_is_the_hook_of_one_extension_point() -> None:
    hooks = {n: f for n, f in vars(hookspecs).items() if n.startswith("dovetail_")}
    assert {s.hook for s in EXTENSION_POINTS} | {"dovetail_extension_points"} == set(hooks)
    reference = (ROOT / "docs/hooks.md").read_text()
    for name, function in hooks.items():
        assert len(function.__doc__ or "") > 60, f"{name} has no docstring to speak of"
        assert f"`{name}`" in reference, f"docs/hooks.md does not mention {name}"


def test_every_extension_point_has_a_provider_and_every_provider_a_summary() -> None:
    registry = load_registry()
    assert not registry.broken
    for extension_point in EXTENSION_POINTS:
        assert extension_point.optional or registry.of(extension_point.name), (
            f"nobody offers anything for {extension_point.name}"
        )
    for offer in registry.offers:
        assert len(offer.provider.summary) > 10
        for name, field in offer.provider.options.model_fields.items():
            assert field.description, f"option {name} of {offer.qualified_name} has no description"


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda p: p.name)
def test_a_plugins_metadata_matches_its_folder(folder: Path) -> None:
    data = tomllib.loads((folder / "pyproject.toml").read_text())
    name, dashed = folder.name, folder.name.replace("_", "-")
    assert data["project"]["name"] == f"dovetail-{dashed}"
    assert data["project"]["entry-points"]["dovetail"] == {dashed: f"dovetail_{name}"}
    assert data["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [
        f"src/dovetail_{name}"
    ]
    assert (folder / f"src/dovetail_{name}/__init__.py").exists()
    assert (folder / f"src/dovetail_{name}/py.typed").exists()
    assert (folder / "README.md").exists()
    assert any((folder / "tests").glob("test_*.py"))
    for other in PLUGINS:
        assert other == folder or f"dovetail-{other.name.replace('_', '-')}" not in str(
            data["project"]["dependencies"]
        )
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required = [*root["project"]["dependencies"], *root["project"]["optional-dependencies"]["dev"]]
    assert f"dovetail-{dashed}" in {r.partition("[")[0] for r in required}, (
        "neither in the default set nor in that of tests"
    )
    assert f"dovetail_{name}" in root["tool"]["importlinter"]["root_packages"]


def test_the_public_api_is_sorted_and_imports() -> None:
    names = dovetail.__all__
    assert names == sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert all(getattr(dovetail, n) is not None for n in names)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dovetail.nonsense


def test_the_repository_names_no_machine() -> None:
    """No path or host of the machine that something was written on."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(?:root|farm|home/\w+|work)/[a-z.]|files\.pythonhosted|/tmp/\w+/")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".yaml", "")
            and path.is_file()
            and "weights" not in name
        ):
            if name.startswith(
                ("plugins/demo_model/held_out", "plugins/demo_model/calibration", "LICENSE")
            ):
                continue
            found = pattern.search(path.read_text(errors="ignore"))
            assert not found, f"{name}: {found and found.group()}"
