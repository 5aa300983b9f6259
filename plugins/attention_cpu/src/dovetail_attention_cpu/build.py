"""Compiling the kernel: once a machine, at first use, into the user's cache folder.

The result is a plain C library: it needs a compiler, and neither Python's nor PyTorch's headers. It is named by a digest of
everything that it depends on, so that a new version, compiler or CPU (a shared home folder) finds no stale one.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dovetail.errors import PluginError
from dovetail.facts import DeviceFacts

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# -ffp-contract=off: multiply-adds are written out, so that what the compiler inlines where cannot change a result.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off")
TARGETS = {"native": ("-march=native",), "avx2": ("-march=x86-64-v3",)}
NUM_ERROR_LINES = 15


def cache_folder() -> Path:
    """`dovetail/attention-cpu` in `$XDG_CACHE_HOME`, which is `~/.cache` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dovetail" / "attention-cpu"


def load_kernel(facts: DeviceFacts, target: str, openmp: Path | None, folder: Path | None = None) -> Path:
    """Return the path of the compiled library; compile it if it is not there, or cannot be loaded.

    `openmp`: the OpenMP library that the tensor library has loaded. The kernel links to the same one, so that both share one
    pool of threads. Two processes do not build at once. Raises `PluginError` with the compiler's last lines.
    """
    if facts.compiler is None:
        raise PluginError("attention-cpu needs a C++ compiler: install g++ or clang++, or set CXX", provider="attention-cpu")
    folder = cache_folder() if folder is None else folder
    flags = (*FLAGS, *TARGETS[target])
    library = folder / f"{_digest(facts, flags, openmp)}.so"
    if _loads(library):
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if not _loads(library):  # another process may have built it meanwhile
                _compile(facts.compiler, flags, openmp, library)
    except OSError as e:
        raise PluginError(
            f"attention-cpu cannot write its compiled kernel to {folder}: {e}; set XDG_CACHE_HOME", provider="attention-cpu"
        ) from e
    if not _loads(library):
        raise PluginError(f"attention-cpu was compiled, and {library} cannot be loaded", provider="attention-cpu")
    return library


def _digest(facts: DeviceFacts, flags: tuple[str, ...], openmp: Path | None) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    version = subprocess.run([str(facts.compiler), "--version"], capture_output=True, text=True, check=False).stdout
    for part in (version, facts.machine, *sorted(facts.cpu_flags), *flags, str(openmp)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _loads(library: Path) -> bool:
    """A library that another system left here, or that a full disk cut short, is built again."""
    if not library.is_file():
        return False
    try:
        ctypes.CDLL(str(library))
    except OSError as e:
        log.warning("attention-cpu: %s cannot be loaded and is built again: %s", library, e)
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when a process dies."""
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, flags: tuple[str, ...], openmp: Path | None, library: Path) -> None:
    log.info("attention-cpu: compiling its kernel for this CPU, once (some seconds)")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent) as build:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [str(Path(build) / f"{s.stem}.o") for s in sources]
        commands = [[compiler, *flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_call, commands))
        linked = Path(build) / library.name
        omp = ["-fopenmp"] if openmp is None else [str(openmp), f"-Wl,-rpath,{openmp.parent}"]
        _call([compiler, "-shared", *objects, "-o", str(linked), *omp])
        linked.replace(library)  # complete or not there at all
    log.info("attention-cpu: compiled in %.0f s", time.perf_counter() - start)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-NUM_ERROR_LINES:])
        raise PluginError(f"attention-cpu could not be compiled: {' '.join(command)}\n{tail}", provider="attention-cpu")
