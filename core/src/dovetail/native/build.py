"""Compiling a plugin's C++: once a machine, at first use, into the user's cache folder.

Code is loaded only from a folder and a file that nobody else can write to (`private`): a cache may
lie in a shared place.

The result is a plain C library: it needs a compiler, and neither Python's nor a tensor library's
headers. It is named by a digest of everything that it depends on, so that a new version, compiler
or CPU (a shared home folder) finds no stale one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import importlib.util
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dovetail.errors import PluginError
from dovetail.facts import DeviceFacts
from dovetail.native.private import private_folder, why_not_ours

log = logging.getLogger(__name__)

INCLUDE = Path(__file__).parent / "include"
"""Headers that every library may include: vectors (dovetail/vec.h), number types
(dovetail/element.h), compiled steps (dovetail/step.h)."""

Target = Literal["native", "avx2", "amx"]
"""Instructions to compile for: all that this CPU has, AVX2 alone, or those of the first CPUs with
AMX (which an older CPU can compile for, and not run)."""

# -ffp-contract=off: multiply-adds are written out, so that what the compiler inlines where cannot
# change a result.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", f"-I{INCLUDE}")
TARGETS: dict[Target, tuple[str, ...]] = {
    "native": ("-march=native",),
    "avx2": ("-march=x86-64-v3",),
    "amx": ("-march=sapphirerapids",),
}
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC", "--threads=0", "-lineinfo")
NUM_ERROR_LINES = 15
FILE_MODE = 0o700


def cache_folder(name: str) -> Path:
    """`dovetail/NAME` in `$XDG_CACHE_HOME`, which is `~/.cache` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dovetail" / name


def openmp_of(package: str) -> Path | None:
    """The OpenMP library that an installed package brings along (PyTorch does), or None if it uses
    the system's.

    A library that links to the same one shares its threads. The package is not imported.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    home = Path(spec.origin).parent
    found = sorted(
        [*home.glob("lib/libgomp*.so*"), *home.parent.glob(f"{package}.libs/libgomp*.so*")]
    )
    return found[0] if found else None


def build_library(
    name: str,
    sources: Path,
    facts: DeviceFacts,
    *,
    target: Target = "native",
    defines: Sequence[str] = (),
    openmp: Path | None = None,
    folder: Path | None = None,
) -> Path:
    """Return the path of the library of `sources/*.cpp`; compile it if it is not there, or cannot
    be loaded.

    `name` is the provider's, for messages and the cache folder. `openmp` as `openmp_of` answers.
    Two processes do not build at once. Raises `PluginError` with the compiler's last lines.
    """
    if facts.compiler is None:
        raise PluginError(
            f"{name} needs a C++ compiler: install g++ or clang++, or set CXX", provider=name
        )
    omp = ("-fopenmp",) if openmp is None else (str(openmp), f"-Wl,-rpath,{openmp.parent}")
    build = Build(
        name,
        sources,
        "*.cpp",
        facts.compiler,
        (*FLAGS, *TARGETS[target], *(f"-D{d}" for d in defines)),
        omp,
    )
    return build.library(facts, cache_folder(name) if folder is None else folder)


def build_cuda_library(
    name: str,
    sources: Path,
    facts: DeviceFacts,
    architectures: Sequence[str],
    *,
    folder: Path | None = None,
) -> Path:
    """The same of `sources/*.cu`, by nvcc, for GPUs of these architectures ("sm_90"). It needs no
    GPU, and no header of a tensor library: pointers and the stream are passed as numbers."""
    if facts.nvcc is None:
        raise PluginError(
            f"{name} needs CUDA's compiler: install the CUDA toolkit, or set CUDA_HOME",
            provider=name,
        )
    targets = tuple(
        f"-gencode=arch=compute_{a.removeprefix('sm_')},code={a}" for a in architectures
    )
    build = Build(name, sources, "*.cu", facts.nvcc, (*CUDA_FLAGS, *targets), targets)
    return build.library(facts, cache_folder(name) if folder is None else folder)


@dataclass(frozen=True)
class Build:
    """What a library is made of."""

    name: str
    sources: Path
    pattern: str
    compiler: str
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]

    def library(self, facts: DeviceFacts, folder: Path) -> Path:
        name, library = self.name, folder / f"{_digest(self, facts)}.so"
        try:
            private_folder(name, folder)
            if _loads(name, library):
                return library
            with _locked(library.with_suffix(".lock")):
                if not _loads(name, library):  # another process may have built it meanwhile
                    _compile(self, library)
        except OSError as e:
            if e.errno == errno.ELOOP:
                raise PluginError(
                    f"{name}: {e.filename} is a link: remove it", provider=name
                ) from None
            raise PluginError(
                f"{name} cannot write its kernels to {folder}: {e}; set XDG_CACHE_HOME",
                provider=name,
            ) from e
        if not _loads(name, library):
            raise PluginError(f"{name} was compiled, and {library} cannot be loaded", provider=name)
        return library


def _digest(build: Build, facts: DeviceFacts) -> str:
    digest = hashlib.sha256()
    for file in sorted([*build.sources.iterdir(), *(INCLUDE / "dovetail").iterdir()]):
        digest.update(file.name.encode() + file.read_bytes())
    compiler = Path(build.compiler).resolve()
    stat = compiler.stat() if compiler.exists() else None
    # The compiler's file stands for its version: asking it costs more than the rest of a start with
    # a built library.
    version = (compiler, stat and stat.st_size, stat and stat.st_mtime_ns)
    for part in (
        *map(str, version),
        facts.machine,
        *sorted(facts.cpu_flags),
        *build.flags,
        *build.link_flags,
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _loads(name: str, library: Path) -> bool:
    """A library that others may have put here, that another system left, or that a full disk cut
    short, is built again."""
    if not os.path.lexists(library):
        return False
    if why := why_not_ours(library):
        log.warning("%s: %s %s; it is not loaded, and built again", name, library, why)
        return False
    try:
        ctypes.CDLL(str(library))
    except OSError as e:
        log.warning("%s: %s cannot be loaded and is built again: %s", name, library, e)
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when a process dies. Nothing is
    written, no link followed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(build: Build, library: Path) -> None:
    name = build.name
    log.info("%s: compiling its kernels for this machine, once (some seconds)", name)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        files = sorted(build.sources.glob(build.pattern))
        objects = [str(Path(folder) / f"{s.stem}.o") for s in files]
        commands = [
            [build.compiler, *build.flags, "-c", str(s), "-o", o]
            for s, o in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda command: _call(name, command), commands))
        linked = Path(folder) / library.name
        _call(name, [build.compiler, "-shared", *objects, "-o", str(linked), *build.link_flags])
        linked.chmod(FILE_MODE)  # whatever the umask: see why_not_ours
        linked.replace(library)  # complete or not there at all
    log.info("%s: compiled in %.0f s", name, time.perf_counter() - start)


def _call(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-NUM_ERROR_LINES:])
        raise PluginError(
            f"{name} could not be compiled: {' '.join(command)}\n{tail}", provider=name
        )
