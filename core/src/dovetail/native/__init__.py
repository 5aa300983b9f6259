"""Build C++ and CUDA C++ code of plugins (`build`), and provide headers that their libraries share
(`include/dovetail`)."""

from __future__ import annotations

from dovetail.native.build import (
    INCLUDE,
    Target,
    build_cuda_library,
    build_library,
    cache_folder,
    openmp_of,
)
from dovetail.native.memory import zeros
from dovetail.native.private import private_folder
from dovetail.native.waiting import bounded_spinning

__all__ = [
    "INCLUDE",
    "Target",
    "bounded_spinning",
    "build_cuda_library",
    "build_library",
    "cache_folder",
    "openmp_of",
    "private_folder",
    "zeros",
]
