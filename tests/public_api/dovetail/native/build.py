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
INCLUDE = Path(__file__).parent / 'include'
Target = Literal['native', 'avx2', 'amx']
FLAGS = ('-std=c++20', '-O3', '-fPIC', '-fopenmp', '-ffp-contract=off', f'-I{INCLUDE}')
TARGETS: dict[Target, tuple[str, ...]] = {'native': ('-march=native',), 'avx2': ('-march=x86-64-v3',), 'amx': ('-march=sapphirerapids',)}
CUDA_FLAGS = ('-std=c++17', '-O3', '-Xcompiler=-fPIC', '--threads=0', '-lineinfo')
NUM_ERROR_LINES = 15
FILE_MODE = 448

def cache_folder(name: str) -> Path:
    ...

def openmp_of(package: str) -> Path | None:
    ...

def build_library(name: str, sources: Path, facts: DeviceFacts, *, target: Target='native', defines: Sequence[str]=(), openmp: Path | None=None, folder: Path | None=None) -> Path:
    ...

def build_cuda_library(name: str, sources: Path, facts: DeviceFacts, architectures: Sequence[str], *, folder: Path | None=None) -> Path:
    ...

@dataclass(frozen=True)
class Build:
    name: str
    sources: Path
    pattern: str
    compiler: str
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]

    def library(self, facts: DeviceFacts, folder: Path) -> Path:
        ...
