"""The versions of transformers that the bridge names as tried, the ranges of the packages, and the
environments agree."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import compat
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from dovetail_models_transformers.versions import TESTED_TRANSFORMERS

ROOT = Path(__file__).parents[1]
OLDEST, *_, NEWEST = map(Version, TESTED_TRANSFORMERS)


@pytest.mark.parametrize("plugin", ["models_transformers", "quantize"])
def test_the_range_begins_at_the_oldest_and_ends_before_the_next_major_version(plugin: str) -> None:
    project = tomllib.loads((ROOT / f"plugins/{plugin}/pyproject.toml").read_text())["project"]
    (requirement,) = (
        r for r in map(Requirement, project["dependencies"]) if r.name == "transformers"
    )
    assert str(requirement.specifier) == f"<{NEWEST.major + 1},>={OLDEST.major}.{OLDEST.minor}"
    assert all(version in requirement.specifier for version in TESTED_TRANSFORMERS)


def test_versions_are_in_order_and_the_last_is_the_one_that_is_pinned() -> None:
    assert OLDEST < NEWEST
    assert sorted(map(Version, TESTED_TRANSFORMERS)) == [Version(v) for v in TESTED_TRANSFORMERS]
    assert f"transformers=={NEWEST}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_version_imported_is_the_one_wanted() -> None:
    """`make compat` names the version of its run; otherwise it is the pinned one."""
    import transformers

    assert transformers.__version__ == os.environ.get(compat.VARIABLE, str(NEWEST))


def test_every_test_of_compat_exists_and_those_that_reach_into_transformers_are_among_them() -> (
    None
):
    assert all((ROOT / path).exists() for path in compat.TESTS)
    for path in (ROOT / "plugins").glob("*/tests/test_*.py"):
        if "import transformers" in path.read_text():
            assert any(path.is_relative_to(ROOT / listed) for listed in compat.TESTS), path
