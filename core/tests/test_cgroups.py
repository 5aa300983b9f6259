"""What is read of control groups, over folders that look like /sys/fs/cgroup and /proc/self."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dovetail.facts import available_memory, device_facts, usable_cores
from dovetail.facts.cgroups import CgroupLimits, read_limits

MIB = 2**20
UNLIMITED_V1 = str(2**63 - 4096)


class Machine:
    """`tmp_path` has `proc`, a process' folder, and `sys`, where groups are mounted."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys = folder / "proc", folder / "sys fs"  # mountinfo escapes the blank
        self.proc.mkdir()
        self.mounts, self.memberships = "22 1 0:20 / /proc rw shared:5 - proc proc rw\n", ""

    def mount(self, at: str, kind: str, controllers: str = "", root: str = "/") -> None:
        point = str(self.sys / at).replace(" ", "\\040")
        self.mounts += (
            f"31 22 0:28 {root} {point} rw,relatime shared:9 - {kind} {kind} rw,{controllers}\n"
        )
        (self.proc / "mountinfo").write_text(self.mounts)

    def belong(self, controllers: str, path: str) -> None:
        self.memberships += f"4:{controllers}:{path}\n"
        (self.proc / "cgroup").write_text(self.memberships)

    def write(self, group: str, **files: object) -> None:
        folder = self.sys / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")

    @property
    def limits(self) -> CgroupLimits:
        return read_limits(self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def v2(machine: Machine) -> Machine:
    machine.mount("", "cgroup2")
    machine.belong("", "/pods/pod/container")
    machine.write(
        "pods/pod/container",
        cpu_max="max 100000",
        memory_max="max",
        memory_high="max",
        memory_current=7,
    )
    return machine


def test_no_limits(v2: Machine) -> None:
    assert v2.limits == CgroupLimits()


def test_no_groups_at_all(machine: Machine) -> None:
    assert machine.limits == CgroupLimits()
    machine.belong("memory", "/a")  # mountinfo is missing
    assert machine.limits == CgroupLimits()


@pytest.mark.parametrize("group", ["pods/pod/container", "pods/pod", "pods", ""])
def test_the_limit_of_any_group_above_counts(v2: Machine, group: str) -> None:
    v2.write(group, cpu_max="150000 100000", memory_max=100 * MIB, memory_current=30 * MIB)
    v2.write(
        group,
        memory_stat=(
            f"anon {20 * MIB}\nfile {10 * MIB}\ninactive_file {4 * MIB}\nactive_file {6 * MIB}"
        ),
    )
    assert v2.limits == CgroupLimits(1.5, 100 * MIB, 74 * MIB)


def test_the_tightest_counts(v2: Machine) -> None:
    for group, limit, used in (("pods", 1000, 990), ("pods/pod", 100, 10)):
        v2.write(
            group,
            cpu_max=f"{limit * 100} 100000",
            memory_max=limit * MIB,
            memory_current=used * MIB,
            memory_stat="",
        )
    assert v2.limits == CgroupLimits(0.1, 100 * MIB, 10 * MIB)


def test_high_is_a_limit(v2: Machine) -> None:
    v2.write(
        "pods/pod/container",
        memory_max=100 * MIB,
        memory_high=80 * MIB,
        memory_current=90 * MIB,
        memory_stat="",
    )
    assert v2.limits == CgroupLimits(None, 80 * MIB, 0)


def test_a_group_that_is_over_its_limit_leaves_nothing(v2: Machine) -> None:
    v2.write("pods", memory_max=MIB, memory_current=2 * MIB, memory_stat="inactive_file 0")
    assert v2.limits.available_bytes == 0


def test_a_namespace_shows_its_own_root(machine: Machine) -> None:
    machine.mount("", "cgroup2")
    machine.belong("", "/")
    machine.write("", cpu_max="50000 100000", memory_max=MIB)
    assert machine.limits == CgroupLimits(0.5, MIB)


def test_a_process_outside_the_root_of_its_namespace(machine: Machine) -> None:
    machine.mount("", "cgroup2")
    machine.belong("", "/../sibling")
    machine.write("", cpu_max="50000 100000")
    machine.write("../sibling", cpu_max="10000 100000")
    assert machine.limits.num_cpus == 0.5


def test_nonsense_is_no_limit(v2: Machine) -> None:
    v2.write("pods", cpu_max="", memory_max="lots")
    v2.write("pods/pod", cpu_max="100000 0")
    assert v2.limits == CgroupLimits()


@pytest.fixture
def v1(machine: Machine) -> Machine:
    machine.mount("cpu,cpuacct", "cgroup", "cpuacct,cpu")
    machine.mount("memory", "cgroup", "memory")
    machine.mount("unified", "cgroup2")
    machine.belong("cpu,cpuacct", "/docker/abc")
    machine.belong("memory", "/docker/abc")
    machine.belong("name=systemd", "/docker/abc")
    machine.write("cpu,cpuacct/docker/abc", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100000)
    machine.write(
        "memory/docker/abc",
        memory_limit_in_bytes=UNLIMITED_V1,
        memory_usage_in_bytes=5 * MIB,
        memory_stat="",
    )
    return machine


def test_version_1_without_limits(v1: Machine) -> None:
    assert v1.limits == CgroupLimits()


@pytest.mark.parametrize("group", ["docker/abc", "docker", ""])
def test_version_1(v1: Machine, group: str) -> None:
    v1.write(f"cpu,cpuacct/{group}", cpu_cfs_quota_us=250000, cpu_cfs_period_us=100000)
    v1.write(f"memory/{group}", memory_limit_in_bytes=100 * MIB, memory_usage_in_bytes=30 * MIB)
    v1.write(f"memory/{group}", memory_stat=f"inactive_file 1\ntotal_inactive_file {4 * MIB}")
    assert v1.limits == CgroupLimits(2.5, 100 * MIB, 74 * MIB)


def test_version_1_in_a_container_that_sees_the_hosts_paths(machine: Machine) -> None:
    """Docker without a namespace of groups: the container's own group is mounted as the root."""
    for name in ("cpu", "memory"):
        machine.mount(name, "cgroup", name, root="/docker/abc")
        machine.belong(name, "/docker/abc")
    machine.write("cpu", cpu_cfs_quota_us=100000, cpu_cfs_period_us=100000)
    machine.write("memory", memory_limit_in_bytes=MIB, memory_usage_in_bytes=0, memory_stat="")
    assert machine.limits == CgroupLimits(1.0, MIB, MIB)


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    cores = {None: 8, 0.1: 1, 1.0: 1, 1.9: 1, 2.0: 2, 7.99: 7, 64.0: 8}
    assert {quota: usable_cores(quota) for quota in cores} == cores


def test_available_memory(v2: Machine, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert available_memory(v2.proc, meminfo) is None
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable:     512 kB\n")
    assert available_memory(v2.proc, meminfo) == MIB // 2
    v2.write("pods", memory_max=MIB // 4, memory_current=0, memory_stat="")
    assert available_memory(v2.proc, meminfo) == MIB // 4


def test_facts_of_the_machine_are_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dovetail.facts.device.read_limits", lambda: CgroupLimits(1.5, 64 * MIB, 32 * MIB)
    )
    facts = device_facts.__wrapped__()
    assert (facts.num_cores, facts.memory_bytes) == (1, 64 * MIB)
