"""What control groups leave of a machine's CPUs and memory: Linux gives a container less than
`/proc/meminfo` and the processes' affinity say. Versions 1 and 2, and both at once; see the
kernel's admin-guide/cgroup-v2.rst and cgroup-v1/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")
UNLIMITED = 2**62
"""Bytes; version 1 writes a number near 2^63 where nothing is limited."""


@dataclass(frozen=True)
class CgroupLimits:
    """The tightest of all groups that a process is in, up to the root it can see. None: nothing
    limits it."""

    num_cpus: float | None = None
    """CPU time that is granted, in CPUs."""
    memory_bytes: int | None = None
    available_bytes: int | None = None
    """What the limits leave beside what their groups have taken already; files that are cached and
    idle do not count."""


def read_limits(proc: Path = PROC) -> CgroupLimits:
    """The limits now. `proc` is a process' folder in /proc; its mountinfo says where groups are
    mounted."""
    cpus: list[float] = []
    limits: list[int] = []
    available: list[int] = []
    for version, group in _groups(proc):
        with suppress(_NotLimited):
            cpus.append(_cpus_v1(group) if version == 1 else _cpus_v2(group))
        names = (
            ("memory.limit_in_bytes",) if version == 1 else ("memory.max", "memory.high")
        )  # above high it is slowed down
        for name in names:
            with suppress(_NotLimited):
                limit = _number(group / name)
                limits.append(limit)
                available.append(max(0, limit - _used(group, version)))
    return CgroupLimits(
        min(cpus, default=None), min(limits, default=None), min(available, default=None)
    )


class _NotLimited(Exception):
    """A file that is not there, or that states no limit."""


def _groups(proc: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) of each group that the process is in, and of those that hold it, as far as
    they are mounted."""
    try:
        memberships = (proc / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (proc / "mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux, or /proc is hidden
        return
    paths: dict[str, str] = {}  # by controller; version 2 has one tree, under the name ""
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    for line in mounts:
        before, _, after = line.partition(" - ")
        root, point = (_unescaped(field) for field in before.split()[3:5])
        kind, _, options = after.split()[:3]
        if kind == "cgroup2":
            path, version = paths.get("", "/"), 2
        elif kind == "cgroup" and (found := {"cpu", "memory"} & set(options.split(","))):
            path, version = paths.get(min(found), "/"), 1
        else:
            continue
        # Without a namespace of its own, a container sees the path on the host, and has its own
        # group mounted as the root.
        inside = PurePosixPath(path)
        below = (
            inside.relative_to(root)
            if inside.is_relative_to(root) and ".." not in inside.parts
            else PurePosixPath()
        )
        for part in (below, *below.parents):
            yield version, Path(point, part)


def _unescaped(field: str) -> str:
    """mountinfo has spaces and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise _NotLimited from None


def _number(path: Path) -> int:
    text = _text(path).strip()
    if not text.isdigit() or int(text) > UNLIMITED:  # max; -1 in version 1
        raise _NotLimited
    return int(text)


def _cpus_v2(group: Path) -> float:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota.isdigit() or not period.strip().isdigit() or int(period) == 0:
        raise _NotLimited
    return int(quota) / int(period)


def _cpus_v1(group: Path) -> float:
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    if period == 0:
        raise _NotLimited
    return quota / period


def _used(group: Path, version: int) -> int:
    """Bytes that cannot be had back without swapping. Cached files that were used lately count:
    they may be weights."""
    total, idle = (
        ("memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.current", "inactive_file")
    )
    used = _number(group / total)
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == idle and value.isdigit():
            return max(0, used - int(value))
    return used
