"""Every package in examples/, installed and used as a third party would: a wheel in a fresh
environment, no configuration."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from third_party import A_SLICE, Environment

from dovetail.cli.main import _parser
from dovetail_testing.plugin import make_model

EXAMPLES = sorted(
    p.parent for p in (Path(__file__).parents[1] / "examples").glob("*/pyproject.toml")
)
PRIVATE = (
    "dovetail.engine",
    "dovetail.assembly",
    "dovetail.composition",
    "dovetail.runtime.engine_process",
    "dovetail.runtime.wire",
    "dovetail.plugin.discovery",
    "dovetail.cli",
)
"""Modules of the core that are no plugin's business (pyproject.toml holds our own plugins to the
same)."""


GENERATE = ("generate", "import os", "--max-tokens", "12", "--dtype", "float32", "--device", "cpu")
OWN_TEXT = ("architecture_gpt2", "quant_nf4")
"""Other weights may say something else; tests of their own know what (test_example_*.py)."""


@dataclass(frozen=True)
class Installed:
    """An example in an environment of its own."""

    source: Path
    environment: Environment

    @property
    def distribution(self) -> str:
        name: str = tomllib.loads((self.source / "pyproject.toml").read_text())["project"]["name"]
        return name

    @property
    def composition(self) -> str:
        return str(self.source / "engine.yaml")


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda p: p.name)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Its wheel, built and installed by pip into a new environment; where it runs there is a GPT-2,
    in a folder `gpt2`."""
    environment = Environment.make(tmp_path_factory.mktemp(request.param.name) / "venv")
    environment.install(request.param)
    if request.param.name == "architecture_gpt2":
        make_gpt2(environment.folder / "gpt2")
    return Installed(request.param, environment)


def make_gpt2(folder: Path) -> None:
    """A tiny one with random weights, whose tokens are bytes."""
    import transformers

    make_model(folder)
    config = transformers.GPT2Config(
        vocab_size=261, n_embd=32, n_head=2, n_layer=2, n_positions=128, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def text_without(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the demo model says when no example is installed."""
    return Environment.make(tmp_path_factory.mktemp("without") / "venv").dovetail(*GENERATE)


def test_it_is_found(example: Installed) -> None:
    listed, explained = example.environment.dovetails(
        ("plugins", "--json"), ("explain", example.composition)
    )
    (plugin,) = [p for p in json.loads(listed) if p["distribution"] == example.distribution]
    assert plugin["broken"] is None
    assert plugin["offers"]
    assert example.distribution in explained


def test_it_conforms(example: Installed) -> None:
    """Its own test, from its own folder, and a part of the same by the command."""
    assert " passed" in example.environment.test(example.source / "tests")
    said = example.environment.dovetail("conform", example.distribution, "--json", "-k", A_SLICE)
    reports = json.loads(said)
    assert reports
    assert all(report["passed"] and report["checks"] for report in reports)


def test_an_engine_composed_by_a_file_runs_with_it(example: Installed, text_without: str) -> None:
    text = example.environment.dovetail(*GENERATE, "--config", example.composition)
    assert text.startswith("import os")
    assert text == text_without or example.source.name in OWN_TEXT


def test_its_readme_says_what_can_be_done(example: Installed) -> None:
    """Every command of it exists, with its flags; so do the provider, the modules and the engine
    config that it names."""
    listed = json.loads(example.environment.dovetail("plugins", "--json"))
    (plugin,) = [p for p in listed if p["distribution"] == example.distribution]
    names = [plugin["name"], *(offer["name"] for offer in plugin["offers"])]
    (block,) = re.findall(
        r"^```\n(pip install .*?)^```", (example.source / "README.md").read_text(), re.M | re.S
    )
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert {"pip", "dovetail", "pytest"} <= {command[0] for command in commands}
    assert any("engine.yaml" in argument for command in commands for argument in command)
    for command in commands:
        if command[0] == "dovetail":
            asked = _parser().parse_args(command[1:])
            if command[1] == "conform":
                assert asked.name in names
        if command[:2] == ["python", "-m"]:
            module = command[2].replace(".", "/")
            assert (example.source / f"src/{module}.py").is_file()


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
                assert not [
                    m for m in ours if any(part.startswith("_") for part in m.split("."))
                ], f"{path.name}: {ours}"
                imported |= (
                    {(a.asname or a.name).split(".")[0] for a in node.names} if ours else set()
                )
            if isinstance(node, ast.Name):
                assert node.id not in (
                    "setattr",
                    "delattr",
                    "monkeypatch",
                    "mock",
                ), f"{path.name} uses {node.id}"
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                owner = node.value
                while isinstance(owner, ast.Attribute):
                    owner = owner.value
                assert not (isinstance(owner, ast.Name) and owner.id in imported), (
                    f"{path.name} sets {ast.unparse(node)}"
                )


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8
