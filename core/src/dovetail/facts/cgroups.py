"""Read the CPU and memory limits of control groups. Linux gives a container less than
`/proc/meminfo` and the CPU affinity show. Versions 1 and 2 are supported, also in combination; see
the kernel's admin-guide/cgroup-v2.rst and cgroup-v1/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")
UNLIMITED = 2**62
"""Number of bytes above which a limit counts as none; version 1 writes a number near 2^63."""


@dataclass(frozen=True)
class CgroupLimits:
    """The tightest limits of all groups that a process is in, up to the root that it can see. None
    means no limit."""

    num_cpus: float | None = None
    """CPU time granted, in CPUs."""
    memory_bytes: int | None = None
    available_bytes: int | None = None
    """Memory within the limits that the groups do not use yet; inactive cached files do not count
    as used."""


def read_limits(proc: Path = PROC) -> CgroupLimits:
    """Read the current limits. `proc` is a process' folder in /proc; its mountinfo lists where
    groups are mounted."""
    cpus: list[float] = []
    limits: list[int] = []
    available: list[int] = []
    for version, group in _groups(proc):
        with suppress(_NotLimited):
            cpus.append(_cpus_v1(group) if version == 1 else _cpus_v2(group))
        # Above memory.high a process is slowed down.
        names = ("memory.limit_in_bytes",) if version == 1 else ("memory.max", "memory.high")
        for name in names:
            with suppress(_NotLimited):
                limit = _number(group / name)
                limits.append(limit)
                available.append(max(0, limit - _used(group, version)))
    return CgroupLimits(
        min(cpus, default=None), min(limits, default=None), min(available, default=None)
    )


class _NotLimited(Exception):
    """Raised for a file that does not exist or contains no limit."""


def _groups(proc: Path) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of each mounted group that contains the process, and of its
    parents."""
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
        # Without a cgroup namespace a container sees the path on the host, while its own group is
        # mounted as the root.
        inside = PurePosixPath(path)
        below = (
            inside.relative_to(root)
            if inside.is_relative_to(root) and ".." not in inside.parts
            else PurePosixPath()
        )
        for part in (below, *below.parents):
            yield version, Path(point, part)


def _unescaped(field: str) -> str:
    """Decode the octal escapes of mountinfo, which it uses for spaces, for example."""
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
    """Return the bytes that cannot be reclaimed without swapping. Recently used cached files count
    as used, because they may be weights."""
    total, inactive = (
        ("memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.current", "inactive_file")
    )
    used = _number(group / total)
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == inactive and value.isdigit():
            return max(0, used - int(value))
    return used
