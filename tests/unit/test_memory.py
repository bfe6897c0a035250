"""Memory that can be had: of a machine, in control groups of both versions, and under the limits of a process."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from octavo import memory
from octavo.errors import DeviceError

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for / on a machine with 100 MiB free, and 20 MiB of swap."""
    write(tmp_path / "proc/meminfo", f"MemTotal: {200 << 10} kB\nMemAvailable: {100 << 10} kB\nSwapFree: {20 << 10} kB")
    write(tmp_path / "proc/self/status", f"Name:\tpython\nVmSize:\t {40 << 10} kB\nVmData:\t {10 << 10} kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(folder: Path, limit: int | str, used: int, cached: int, swap: tuple[int, int] | None = None) -> None:
    """A control group of version 2."""
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon {used - cached}\ninactive_file {cached // 2}\nactive_file {cached // 2}\n")
    if swap:
        write(folder / "memory.swap.max", f"{swap[0]}\n")
        write(folder / "memory.swap.current", f"{swap[1]}\n")


def refused(needed_mib: int, threads: int = 0) -> str:
    """The words of the refusal, or none."""
    try:
        memory.require(needed_mib * MIB, threads, "model", "Do this.")
    except DeviceError as error:
        return str(error)
    return ""


def test_what_is_free_and_swap_bound_a_process(machine: Path) -> None:
    assert memory.available_bytes() == 100 * MIB
    assert not refused(120)
    assert refused(121) == "model: needs 121.00 MiB of memory, and this machine has free 120.00 MiB. Do this."


def test_a_control_group_leaves_what_its_processes_have_not_taken(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "1:name=systemd:/\n0::/a/b\n")
    group(machine / "cgroup/a/b", 80 * MIB, used=50 * MIB, cached=20 * MIB, swap=(8 * MIB, 3 * MIB))
    group(machine / "cgroup/a", "max", used=0, cached=0)
    assert memory.available_bytes() == 50 * MIB
    assert not refused(55)
    assert "needs 56.00 MiB of memory, and its control group /a/b has left 55.00 MiB" in refused(56)
    group(machine / "cgroup/a", 60 * MIB, used=50 * MIB, cached=0, swap=(0, 0))
    assert "/a has left 10.00 MiB" in refused(11)


def test_a_container_sees_its_own_control_group_as_the_root(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/not/visible/here\n")
    group(machine / "cgroup", 30 * MIB, used=MIB, cached=0, swap=(0, 0))
    assert memory.available_bytes() == 29 * MIB
    assert "has left 29.00 MiB" in refused(30)


def test_control_groups_of_version_1_count(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "5:cpu,memory:/a\n4:devices:/\n0::/\n")
    folder = machine / "cgroup/memory/a"
    write(folder / "memory.limit_in_bytes", f"{50 * MIB}\n")
    write(folder / "memory.usage_in_bytes", f"{30 * MIB}\n")
    write(folder / "memory.stat", f"cache 7\ntotal_inactive_file {4 * MIB}\ntotal_active_file {6 * MIB}\n")
    assert memory.available_bytes() == 30 * MIB


def test_a_limit_of_address_space_counts_what_threads_reserve(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_AS: 240 * MIB, resource.RLIMIT_STACK: 8 * MIB}
    infinite = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits.get(which, infinite), infinite))
    assert memory.available_bytes() == 100 * MIB  # which the page cache could have
    assert not refused(56, threads=2)
    assert "needs 201.00 MiB of memory, and the limit of this process (ulimit -v) leaves 200.00 MiB" in refused(57, 2)
    limits[resource.RLIMIT_DATA] = 12 * MIB
    assert "(ulimit -d) leaves 2.00 MiB" in refused(3)


def test_a_system_that_tells_nothing_refuses_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROC", machine / "nowhere")
    assert memory.available_bytes() == 0
    assert not refused(1 << 30)
