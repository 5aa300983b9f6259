"""constraints.txt pins every distribution that the two commands install, within the ranges that the
projects declare."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from lock import BUILD, CHOSEN, ROOT, Environment, canonical, environments, pins, projects
from packaging.requirements import Requirement

NOT_INSTALLED = {"flashinfer-python"}
"""Requirements of extras that the two commands leave out: they bring CUDA packages along."""
PINNED = pins(ROOT / "constraints.txt")


def declared(folder: Path) -> Iterator[Requirement]:
    """The third-party requirements of a project, its extras and its build backend included."""
    data = tomllib.loads((folder / "pyproject.toml").read_text())
    extras = data["project"].get("optional-dependencies", {}).values()
    lists = [data["project"].get("dependencies", []), *extras, data["build-system"]["requires"]]
    for requirement in map(Requirement, chain.from_iterable(lists)):
        if not canonical(requirement.name).startswith("dovetail"):
            yield requirement


def installed_for(*roots: str) -> dict[str, str]:
    """Versions of all distributions that these requirements lead to in this environment, as their
    metadata says."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [Requirement(root) for root in roots]
    while todo:
        requirement = todo.pop()
        distribution = importlib.metadata.distribution(requirement.name)
        name = canonical(requirement.name)
        found[name] = distribution.version.partition("+")[0]
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            needed = map(Requirement, distribution.requires or [])
            todo += [n for n in needed if n.marker is None or n.marker.evaluate({"extra": extra})]
    return found


@pytest.mark.parametrize(
    "folder", [*projects(), *sorted((ROOT / "examples").glob("*/"))], ids=lambda p: p.name
)
def test_ranges_allow_what_is_pinned(folder: Path) -> None:
    for requirement in declared(folder):
        name = canonical(requirement.name)
        if name in NOT_INSTALLED:
            assert name not in PINNED
            continue
        assert name in PINNED, (
            f"{folder.name} requires {requirement}, which is not pinned: run `make lock`"
        )
        assert PINNED[name] in requirement.specifier, (
            f"{folder.name} requires {requirement}, pinned is {PINNED[name]}"
        )


def test_all_that_the_two_commands_install_is_pinned() -> None:
    """Transitive dependencies too. The other way round, nothing is pinned that nothing needs."""
    found = installed_for("dovetail[dev]", *BUILD)
    third_party = {
        name: version for name, version in found.items() if not name.startswith("dovetail")
    }
    assert third_party == PINNED, "run `make lock`, or reinstall what constraints.txt pins"


@pytest.mark.parametrize("environment", environments(), ids=lambda e: e.what)
def test_chosen_versions_are_pinned_with_their_reason(environment: Environment) -> None:
    text, pinned = environment.constraints.read_text(), pins(environment.constraints)
    assert "torch" in pinned
    for name in CHOSEN.keys() & pinned.keys():
        version, reason = CHOSEN[name]
        assert f"\n{name}=={version}  # {reason}\n" in text


def test_every_installation_of_the_makefile_is_constrained() -> None:
    """Or takes no dependencies, and names exact versions."""
    rules = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    installs = [
        line
        for line in rules
        if line.startswith("\t") and re.search(r"\$\(PIP\)|\bpip (install|download)\b", line)
    ]
    assert len(installs) > 3
    for line in installs:
        assert re.search(r" -c (constraints\.txt|\$<) | --no-deps ", line), line


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("torch>=2", "is not NAME==VERSION"),
        ("torch==2.13.0+cpu", "is not NAME==VERSION"),
        ("-e .", "is not NAME==VERSION"),
        ("a==1\nA==2", "pinned twice"),
        ("a @ file:///a.whl", "is not NAME==VERSION"),
    ],
)
def test_a_line_that_pins_nothing_exactly_is_refused(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text(f"# a comment\n{line}\n")
    with pytest.raises(ValueError, match=said):
        pins(tmp_path / "constraints.txt")


def test_packages_for_gpus_have_one_version() -> None:
    """benchmarks/gpu/flashinfer.txt is installed here, benchmarks/gpu/requirements.txt on the
    machine with a GPU."""
    here, there = (
        pins(ROOT / "benchmarks/gpu/flashinfer.txt"),
        pins(ROOT / "benchmarks/gpu/requirements.txt"),
    )
    both = here.keys() & there.keys()
    assert "flashinfer-python" in both
    assert {name: here[name] for name in both} == {name: there[name] for name in both}
