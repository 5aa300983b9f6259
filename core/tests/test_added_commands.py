"""Commands that packages add to `dovetail`."""

from __future__ import annotations

import importlib.metadata
from argparse import ArgumentParser, Namespace
from types import ModuleType
from typing import Any

import pytest

from dovetail.cli.main import main
from dovetail.errors import ConfigError
from dovetail.interfaces.command import GROUP, Command
from dovetail.interfaces.worker import Progress


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("what")


def run(args: Namespace, progress: Progress) -> int:
    if args.what == "bad":
        raise ConfigError("bad is nothing to say")
    progress("saying", 1, 1)
    print(f"said {args.what}")
    return 7


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make entry points of the group: names, and what module and attribute they name."""
    module = ModuleType("some_package")
    module.SAY = Command("say something", add_arguments, run)  # type: ignore[attr-defined]
    module.WRONG = "not a command"  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "some_package", module)

    def install(**values: str) -> None:
        entries = [
            importlib.metadata.EntryPoint(name, value, GROUP) for name, value in values.items()
        ]
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda group: entries if group == GROUP else []
        )

    return install


def test_a_package_adds_a_command(installed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    installed(say="some_package:SAY")
    assert main(["say", "hello"]) == 7
    said = capsys.readouterr()
    assert (said.out, said.err) == ("said hello\n", "saying: done\n")
    assert main(["say", "bad"]) == 2
    assert capsys.readouterr().err == "dovetail: bad is nothing to say\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "say something" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "why"),
    [("no_such_module:X", "ModuleNotFoundError"), ("some_package:WRONG", "not a Command")],
)
def test_a_broken_command_is_listed_and_refused(
    value: str, why: str, installed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(shout=value, say="some_package:SAY")
    assert main(["shout"]) == 2
    assert why in capsys.readouterr().err
    assert main(["say", "hello"]) == 7


def test_two_of_one_name_are_refused_and_both_are_named(
    installed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(chat="some_package:SAY")
    assert main(["say"]) == 2
    assert (
        "two commands are named 'chat': one from dovetail-core, one from some_package:SAY"
        in capsys.readouterr().err
    )


def test_the_engines_own_commands_ask_nobody(
    installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting a server does not wait for the metadata of commands."""
    monkeypatch.setattr("dovetail.cli.added.add_installed", lambda *_: pytest.fail("asked"))
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
