"""Packages from outside: built into wheels, installed or laid out as pip would, and used without
being known to anyone."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"


COMMANDS = {"dovetail": "dovetail.cli.main", "pip": "pip._internal.cli.main", "pytest": "pytest"}
"""Console scripts, by the module whose `main` they call."""
A_SLICE = "declar or one or memory or stop or router or once or config or travels or is_found"
"""Checks of every contract, for `dovetail conform -k`: some that are quickly done."""
IN_ONE_PROCESS = """
import contextlib, io, json, sys
from dovetail.cli.main import main
answers = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = main(arguments)
    answers.append([status, said.getvalue()])
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own. What its packages depend on is that of this environment: a
    path file leads there, so that nothing is fetched; and nothing could be."""

    folder: Path

    @staticmethod
    def make(folder: Path) -> Environment:
        made = Environment(folder)
        venv.create(folder, with_pip=False)
        here = [p for p in sys.path if p.endswith("site-packages")]
        ahead = [
            p
            for p in os.environ.get("PYTHONPATH", "").split(os.pathsep)
            if p and "examples" not in p
        ]
        lines = [*ahead, *(f"import site; site.addsitedir({p!r})" for p in here)]
        site = next((folder / "lib").glob("python*")) / "site-packages"
        (site / "dependencies.pth").write_text("\n".join(lines) + "\n")
        for name, module in COMMANDS.items():
            script = folder / "bin" / name
            script.write_text(
                f"#!{made.python}\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
            )
            script.chmod(0o755)
        return made

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    @property
    def variables(self) -> dict[str, str]:
        nowhere = dict.fromkeys(
            ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
        )
        own = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NO_PROXY", "no_proxy")
        }
        pip = {
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_QUIET": "1",
        }
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        # One thread: the sizes are tiny, and threads that wait for each other on busy cores take
        # many times as long.
        local = {"no_proxy": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return {
            **own,
            **nowhere,
            **pip,
            **local,
            "PATH": path,
            "VIRTUAL_ENV": str(self.folder),
            "COLUMNS": "200",
        }

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`command` is what Python is given."""
        settings: Any = {"cwd": cwd or self.folder, "env": self.variables, "timeout": 280}
        return subprocess.run(
            [str(self.python), *command], capture_output=True, text=True, **settings
        )

    def install(self, *sources: Path) -> None:
        """Build a wheel of each and install them."""
        wheels = []
        for source in sources:
            out = self.folder / "wheels" / source.name
            build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
            subprocess.run(build, cwd=source, check=True, capture_output=True)
            wheels.append(str(next(out.glob("*.whl"))))
        done = self.run("-m", "pip", "install", "--no-deps", *wheels)
        assert done.returncode == 0, done.stderr

    def dovetail(self, *arguments: str, cwd: Path | None = None) -> str:
        """What a command prints; it must succeed."""
        return self.dovetails(arguments, cwd=cwd)[0]

    def dovetails(self, *commands: tuple[str, ...], cwd: Path | None = None) -> list[str]:
        """What some commands print, run in one process to save the imports; all must succeed."""
        out = self.run("-c", IN_ONE_PROCESS, json.dumps(commands), cwd=cwd)
        assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
        answers: list[list[Any]] = json.loads(out.stdout.splitlines()[-1])
        for command, (status, said) in zip(commands, answers, strict=True):
            assert status == 0, f"dovetail {' '.join(command)}: {said[-5000:]}{out.stderr[-3000:]}"
        return [said for _, said in answers]

    def test(self, *folders: Path, arguments: tuple[str, ...] = ()) -> str:
        """Run packages' own tests, each from its own folder, in one process. Returns the last
        line."""
        usual = (
            "-q",
            "-c",
            os.devnull,
            "-p",
            "no:cacheprovider",
            "--import-mode=importlib",
            "--rootdir",
            str(self.folder),
        )
        out = self.run("-m", "pytest", *usual, *arguments, *map(str, folders))
        assert out.returncode == 0, out.stdout[-5000:]
        return out.stdout.splitlines()[-1]


def site_of(name: str, out: Path) -> Path:
    """A folder with the contents of an example's wheel, as pip would lay them out."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=EXAMPLES / name, check=True, capture_output=True)
    site = out / "site"
    zipfile.ZipFile(next(out.glob("*.whl"))).extractall(site)
    return site


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the package is installed."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=env, timeout=250, cwd=site
    )


def conform(name: str, site: Path) -> None:
    """The package's own tests pass."""
    out = run(
        site,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(EXAMPLES / name / "tests"),
        "--rootdir",
        str(site),
    )
    assert out.returncode == 0, out.stdout[-3000:]
    assert " passed" in out.stdout


def imports_of(name: str) -> set[str]:
    """Top-level modules that a package imports, its own aside. Fails if it sets anything on what it
    imported."""
    found: set[str] = set()
    for path in (EXAMPLES / name / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                found |= {(module or alias.name).split(".")[0] for alias in node.names}
                imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Name) and node.id in ("setattr", "delattr")), (
                f"{path} patches"
            )
            targets = (
                node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            )
            for target in targets:
                if isinstance(target, ast.Attribute | ast.Subscript):
                    root = target.value
                    while isinstance(root, ast.Attribute | ast.Subscript):
                        root = root.value
                    assert not (isinstance(root, ast.Name) and root.id in imported), (
                        f"{path} patches {ast.unparse(target)}"
                    )
    return found - {f"dovetail_{name}"} - set(sys.stdlib_module_names)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port
