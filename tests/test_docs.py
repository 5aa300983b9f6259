"""The documentation says what the code does: generated pages are current, examples run, links lead
somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dovetail.plugin.config import EngineConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    p
    for p in ROOT.rglob("*.md")
    if not any(n.startswith(".") or n == "node_modules" for n in p.relative_to(ROOT).parts)
]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def test_generated_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs/make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, page in module.PAGES.items():
        assert (ROOT / "docs" / name).read_text() == page(), (
            f"docs/{name} is out of date: run python docs/make.py"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def python_examples() -> list[tuple[str, str]]:
    return [
        (f"{p.relative_to(ROOT)}#{i}", code)
        for p in PAGES
        for i, code in enumerate(blocks(p, "python"))
    ]


@pytest.mark.parametrize(
    "code", [c for _, c in python_examples()], ids=[n for n, _ in python_examples()]
)
def test_python_examples_run(code: str, tmp_path: Path) -> None:
    """A block whose first line is a comment that begins with `# not run` only has to compile."""
    if code.startswith("# not run"):
        compile(code, "example", "exec")
        return
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_composition_files_are_valid(page: Path) -> None:
    for text in blocks(page, "yaml"):
        EngineConfig.model_validate(yaml.safe_load(text))


def test_commands_in_the_readme_exist() -> None:
    from dovetail.cli.main import _parser

    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"^(?:\.venv/bin/)?dovetail (\w+)", text, re.M)):
        assert name in _parser().format_help(), name
    targets = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.M)):
        assert re.search(rf"^{target}:", targets, re.M), target


def test_every_path_of_the_architecture_page_is_there() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    paths = re.findall(r"`([\w./-]+(?:\.py|\.cpp|\.h|/[\w-]*))`", page)
    assert len(paths) > 80
    missing = []
    for path in paths:
        if "NAME" in path:
            path = str(Path(path).parent)
        first, _, rest = path.partition("/")
        places = [
            ROOT / path,
            ROOT / "core/src/dovetail" / path,
            ROOT / f"plugins/{first}/src/dovetail_{first}" / rest,
        ]
        if not any(place.exists() for place in places):
            missing.append(path)
    assert not missing
