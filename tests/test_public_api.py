"""The public API is compared with its baseline: a break must be announced."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from api import BASELINE, ROOT, SOURCES, announced, unannounced

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def test_every_break_of_the_baseline_is_announced() -> None:
    found = unannounced(BASELINE, SOURCES, CHANGELOG)
    assert not found, (
        "announce these in CHANGELOG.md under '### Breaking', or undo them:\n" + "\n".join(found)
    )


def copied(folder: Path) -> dict[str, Path]:
    ignored = shutil.ignore_patterns("__pycache__")
    return {
        name: shutil.copytree(source, folder / name, ignore=ignored)
        for name, source in SOURCES.items()
    }


PLAN = "    def plan(self, batch: AttentionBatch, layers: list[AttentionLayer], block_size: int) -> Any:"  # noqa: E501


@pytest.mark.parametrize(
    ("file", "before", "after", "path"),
    [
        (
            "interfaces/attention.py",
            "block_size: int) -> Any:",
            "size: int) -> Any:",
            "AttentionBackend.plan",
        ),
        (
            "interfaces/attention.py",
            PLAN,
            PLAN.replace("int)", "int, stream: int)"),
            "AttentionBackend.plan",
        ),
        ("interfaces/attention.py", "class KVCacheSpec", "class CacheSpec", "KVCacheSpec"),
        ("plugin/provider.py", "    summary: str\n", "", "Provider.summary"),
        ("types.py", "    num_preemptions: int = 0\n", "", "EngineStats.num_preemptions"),
    ],
)
def test_a_break_is_noticed(file: str, before: str, after: str, path: str, tmp_path: Path) -> None:
    sources = copied(tmp_path)
    source = sources["dovetail"]
    text = (source / file).read_text()
    assert before in text
    (source / file).write_text(text.replace(before, after, 1))
    found = unannounced(BASELINE, sources, CHANGELOG)
    assert any(path in line for line in found), found
    module = "dovetail." + file.removesuffix(".py").replace("/", ".")
    told = f"{CHANGELOG}\n### Breaking\n\n- `{module}.{path}`: said so\n"
    assert not [line for line in unannounced(BASELINE, sources, told) if path in line]


def test_what_is_added_breaks_nobody(tmp_path: Path) -> None:
    sources = copied(tmp_path)
    source = sources["dovetail"]
    before = unannounced(BASELINE, sources, CHANGELOG)
    path = source / "interfaces/attention.py"
    more = PLAN.replace("int)", "int, hint: int = 0)")
    path.write_text(
        path.read_text().replace(PLAN, f"    def also(self) -> None: ...\n\n{more}")
        + "\n\nNEW = 1\n"
    )
    assert unannounced(BASELINE, sources, CHANGELOG) == before


def test_only_a_section_of_breaks_announces() -> None:
    text = "## 1.0\n### Breaking\n- `dovetail.types.X` is gone\n## 0.9\n`dovetail.types.Y`\n"
    assert announced(text) == {"dovetail.types.X"}
