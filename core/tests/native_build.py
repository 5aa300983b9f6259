"""A small library to build: in a module of its own, which a spawned process can import."""

from __future__ import annotations

from pathlib import Path

from dovetail.native import build_library

ONE = """#include <dovetail/pieces.h>
extern "C" int one() { return 1; }
"""
TWO = """#include <dovetail/vec.h>
extern "C" int one();
extern "C" int two() { return one() + 1; }
"""


def sources(folder: Path) -> Path:
    path = folder / "csrc"
    path.mkdir(exist_ok=True)
    (path / "one.cpp").write_text(ONE)
    (path / "two.cpp").write_text(TWO)
    return path


def build(facts, folder):
    return build_library("kernels", sources(folder.parent), facts, folder=folder)
