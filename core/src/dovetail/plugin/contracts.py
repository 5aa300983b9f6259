"""Handle the versions of the extension points' contracts: what a plugin was written for, and how
the core serves the previous version.

A plugin declares the versions that it was written for in its package metadata, which is read
without importing anything:

    [project.entry-points."dovetail.contracts"]
    attention = "v0_1:v0_2"     # from 0.1 to 0.2; or one version, "v0_2"

The core serves its own version N of a contract, and version N - 1 through an adapter that wraps an
object of the previous version in one of the current version.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dovetail.errors import PluginError

GROUP = "dovetail.contracts"
Version = tuple[int, ...]


@dataclass(frozen=True)
class Previous:
    """The previous version of a contract, which is deprecated."""

    version: str
    changed: str
    """Requirements of the current version that this one did not have."""
    until: str
    """The version of the contract that no longer serves this one."""
    adapt: Callable[[Any], Any]
    """Wraps what a provider of this version builds in an object of the current version."""


@dataclass(frozen=True)
class WrittenFor:
    """A range of contract versions, both ends included."""

    first: str
    last: str

    def __str__(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"

    def includes(self, version: str) -> bool:
        return _version(self.first) <= _version(version) <= _version(self.last)

    def is_newer(self, version: str) -> bool:
        """Return True if the whole range is newer than `version`."""
        return _version(self.first) > _version(version)


def parse(value: str) -> WrittenFor:
    """Parse `v0_1:v0_2` or `v0_2` from the metadata. Raises `PluginError`."""
    match = re.fullmatch(r"v(\d+)_(\d+)(?::v(\d+)_(\d+))?", value.replace(" ", ""))
    if match is None:
        raise PluginError(f"{value!r} is not a range of contract versions, such as v0_1:v0_2")
    a, b, c, d = match.groups()
    written = WrittenFor(f"{a}.{b}", f"{c or a}.{d or b}")
    if _version(written.first) > _version(written.last):
        raise PluginError(f"{value!r}: the first contract version is newer than the last")
    return written


def as_metadata(version: str) -> str:
    """Format a version for the metadata: "0.2" becomes `v0_2`."""
    return f"v{version.replace('.', '_')}"


def _version(text: str) -> Version:
    return tuple(map(int, text.split(".")))
