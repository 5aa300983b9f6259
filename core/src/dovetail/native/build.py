"""Compile a plugin's C++ code once per machine, at first use, into the user's cache folder.

Code is loaded only from a folder and a file that no other user can write to (`private`), because a
cache may lie in a shared location.

The result is a plain C library: building it needs a compiler, but no headers of Python or a tensor
library. Its name is a digest of everything that it depends on, so that a new version, compiler or
CPU (with a shared home folder) never uses a stale library.
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
"""Include folder for every library: vectors (dovetail/vec.h), number types (dovetail/element.h),
compiled steps (dovetail/step.h)."""

Target = Literal["native", "avx2", "amx"]
"""Instruction set to compile for: that of this CPU, AVX2 only, or that of the first CPUs with AMX
(an older CPU can compile for it but not run it)."""

# -ffp-contract=off: multiply-adds are explicit, so that inlining decisions of the compiler cannot
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
    """Return `dovetail/NAME` in `$XDG_CACHE_HOME`, which defaults to `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dovetail" / name


def openmp_of(package: str) -> Path | None:
    """Return the OpenMP library that comes with an installed package (as with PyTorch), or None if
    the package uses the system's.

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
    """Return the path of the library built from `sources/*.cpp`. Compile it if it does not exist or
    cannot be loaded.

    `name` is that of the provider, for messages and the cache folder. `openmp` is a result of
    `openmp_of`. Two processes do not build at the same time. Raises `PluginError` with the last
    lines of the compiler's output.
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
    """Do the same for `sources/*.cu` with nvcc, for GPUs of the given architectures ("sm_90").
    Needs neither a GPU nor headers of a tensor library: pointers and the stream are passed as
    integers."""
    if facts.nvcc is None:
        raise PluginError(
            f"{name} needs the CUDA compiler: install the CUDA toolkit, or set CUDA_HOME",
            provider=name,
        )
    targets = tuple(
        f"-gencode=arch=compute_{a.removeprefix('sm_')},code={a}" for a in architectures
    )
    build = Build(name, sources, "*.cu", facts.nvcc, (*CUDA_FLAGS, *targets), targets)
    return build.library(facts, cache_folder(name) if folder is None else folder)


@dataclass(frozen=True)
class Build:
    """The inputs of a library."""

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
            raise PluginError(f"{name} was compiled, but {library} cannot be loaded", provider=name)
        return library


def _digest(build: Build, facts: DeviceFacts) -> str:
    digest = hashlib.sha256()
    for file in sorted([*build.sources.iterdir(), *(INCLUDE / "dovetail").iterdir()]):
        digest.update(file.name.encode() + file.read_bytes())
    compiler = Path(build.compiler).resolve()
    stat = compiler.stat() if compiler.exists() else None
    # The compiler's file stands for its version: running the compiler takes longer than the rest of
    # a start with an existing library.
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
    """Return whether the library can be loaded. It is rebuilt if another user may have written it,
    or if it comes from another system or was truncated by a full disk."""
    if not os.path.lexists(library):
        return False
    if why := why_not_ours(library):
        log.warning("%s: %s %s; it is not loaded but built again", name, library, why)
        return False
    try:
        ctypes.CDLL(str(library))
    except OSError as e:
        log.warning("%s: %s cannot be loaded and is built again: %s", name, library, e)
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the system releases it when a process dies. Writes nothing and
    follows no link."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(build: Build, library: Path) -> None:
    name = build.name
    log.info(
        "%s: compiling kernels for this machine; this happens once and takes some seconds", name
    )
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
        linked.chmod(FILE_MODE)  # independent of the umask: see why_not_ours
        linked.replace(library)  # atomic
    log.info("%s: compiled in %.0f s", name, time.perf_counter() - start)


def _call(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-NUM_ERROR_LINES:])
        raise PluginError(
            f"{name} could not be compiled: {' '.join(command)}\n{tail}", provider=name
        )
