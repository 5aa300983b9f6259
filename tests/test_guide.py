"""docs/writing-a-plugin.md, carried out: every command and every change, in order, in a fresh
environment without network.

A `console` block has commands after `$ ` and what they print; `…` stands for anything in a line,
or, alone, for any lines. A `diff` block names its file in its first line.
"""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest
from third_party import Environment, free_port

GUIDE = Path(__file__).parents[1] / "docs/writing-a-plugin.md"
PORT = "8123"
"""The guide's, for which the test takes a free one."""


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(console|diff)\n(.*?)^```", GUIDE.read_text(), re.M | re.S)


def commands_of(block: str) -> list[tuple[str, list[str]]]:
    """(command, the lines it is said to print)."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def matches(expected: list[str], lines: list[str]) -> bool:
    """Whether lines are as expected; runs of blanks count as one."""

    def pattern(line: str) -> str:
        parts = [
            r"\s+".join(map(re.escape, part.split(" ")))
            for part in re.sub(" +", " ", line).split("…")
        ]
        return ".*".join(parts).replace(r"\s+.*\s+", r"\s+(?:.*\s+)?") + r"\s*\n"

    whole = "".join(r"(?:.*\n)*?" if line == "…" else pattern(line) for line in expected)
    return re.fullmatch(whole, "".join(f"{line}\n" for line in lines)) is not None


def apply(block: str, folder: Path) -> None:
    """Carry out a change: its context and removed lines must be there, together and once."""
    name, *lines = block.splitlines()
    path = folder / name.removeprefix("--- ")
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    text = path.read_text()
    assert text.count(old) == 1, f"{name}: found {text.count(old)} times, not once:\n{old}"
    path.write_text(text.replace(old, new))


class Shell:
    """Commands in one folder, some of them in the background."""

    def __init__(self, environment: Environment, folder: Path) -> None:
        self.environment, self.folder = environment, folder
        self.background: list[subprocess.Popen[bytes]] = []

    def run(self, command: str) -> tuple[int, list[str]]:
        """Exit status, and the lines printed: errors too, if it failed."""
        settings = {"cwd": self.folder, "env": self.environment.variables}
        if command.endswith(" &"):
            self.background.append(
                subprocess.Popen(["bash", "-c", f"exec {command[:-2]}"], **settings)
            )  # type: ignore[call-overload]
            return 0, []
        if command == "kill %1":
            server = self.background.pop()
            server.send_signal(signal.SIGTERM)
            return server.wait(timeout=60), []
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=250, **settings
        )  # type: ignore[call-overload]
        return (
            done.returncode,
            (done.stdout + (done.stderr if done.returncode else "")).splitlines(),
        )


def test_the_guide_is_carried_out(tmp_path: Path) -> None:
    shell = Shell(Environment.make(tmp_path / "venv"), tmp_path / "work")
    shell.folder.mkdir()
    port = str(free_port())
    num_commands = 0
    try:
        for kind, block in blocks():
            if kind == "diff":
                apply(block, shell.folder)
                continue
            for command, expected in commands_of(block):
                status, lines = shell.run(command.replace(PORT, port))
                num_commands += 1
                wanted = 0
                if expected and (told := re.fullmatch(r"\(exit status (\d+)\)", expected[-1])):
                    wanted, expected = int(told.group(1)), expected[:-1]
                shown = "\n".join(lines)
                assert status == wanted, (
                    f"$ {command}\n{shown}\nexit status {status}, and {wanted} in the guide"
                )
                assert matches(expected, lines), (
                    f"$ {command}\n{shown}\nand in the guide:\n" + "\n".join(expected)
                )
    finally:
        for process in shell.background:
            process.kill()
            process.wait()
    assert num_commands > 10


@pytest.mark.parametrize(
    ("expected", "lines", "same"),
    [
        (["a … c", "…", "z"], ["a   b  c", "x", "y", "z"], True),
        (["a … c", "…", "z"], ["a c", "z"], True),
        (["a", "z"], ["a", "x", "z"], False),
        (["a", "…"], ["a"], True),
        ([], ["said nothing of this"], False),
        (["2 passed; …"], ["12 passed; 3 s"], False),
    ],
)
def test_output_is_compared(expected: list[str], lines: list[str], same: bool) -> None:
    assert matches(expected, lines) is same
