"""Versions of the extension points' contracts: what a plugin was written for, and how the core
serves the version before its own.

A plugin says in its package metadata, which is read without importing anything, what it was written
for:

    [project.entry-points."dovetail.contracts"]
    attention = "v0_1:v0_2"     # from 0.1 to 0.2; or one version, "v0_2"

The core serves its own version N of a contract and N - 1, the latter through an adapter: an object
of the old shape goes in, one of the new shape comes out.
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
    """The version of a contract before the present one, which is deprecated."""

    version: str
    changed: str
    """What the present one asks that this one did not."""
    until: str
    """The version of the contract that no longer serves it."""
    adapt: Callable[[Any], Any]
    """From what a provider written for it builds to what the present contract asks."""


@dataclass(frozen=True)
class WrittenFor:
    """A range of contract versions, ends included."""

    first: str
    last: str

    def __str__(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"

    def includes(self, version: str) -> bool:
        return _version(self.first) <= _version(version) <= _version(self.last)

    def is_newer(self, version: str) -> bool:
        """All of the range is newer than `version`."""
        return _version(self.first) > _version(version)


def parse(value: str) -> WrittenFor:
    """`v0_1:v0_2` or `v0_2`, as the metadata has it. Raises `PluginError`."""
    match = re.fullmatch(r"v(\d+)_(\d+)(?::v(\d+)_(\d+))?", value.replace(" ", ""))
    if match is None:
        raise PluginError(f"{value!r} is not a range of contract versions, such as v0_1:v0_2")
    a, b, c, d = match.groups()
    written = WrittenFor(f"{a}.{b}", f"{c or a}.{d or b}")
    if _version(written.first) > _version(written.last):
        raise PluginError(f"{value!r}: the range of contract versions ends before it begins")
    return written


def as_metadata(version: str) -> str:
    """One version as the metadata has it: "0.2" is `v0_2`."""
    return f"v{version.replace('.', '_')}"


def _version(text: str) -> Version:
    return tuple(map(int, text.split(".")))
