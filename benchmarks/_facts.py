"""Facts about where a benchmark runs: machine, storage, versions, commit. Run alone, it prints them."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def machine(folder: Path) -> dict[str, Any]:
    """CPU, memory, kernel, GPU where there is one, and the storage that ``folder`` lies on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "cpu": found[1] if found else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / (1 << 20), 1) if memory else None,
        "kernel": platform.release(),
        **gpu(),
        "storage": _storage(folder),
        "load_average": os.getloadavg()[0],
    }


def gpu() -> dict[str, str]:
    """Name, memory and driver of the first GPU; nothing where there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(("gpu", "gpu_memory", "gpu_driver"), found[0].split(", "), strict=True)) if found else {}


def _storage(folder: Path) -> str:
    device, mount, kind = _mount(folder)
    return f"{device} {kind} at {mount}"


def file_system(folder: Path) -> str:
    """tmpfs, ext4, ..."""
    return _mount(folder)[2]


def _mount(folder: Path) -> list[str]:
    """Device, mount point and file system of a folder."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    found = (m for m in mounts if folder.resolve().is_relative_to(m[1]))
    return max(found, key=lambda m: len(m[1]), default=["?", "?", "?"])


def machine_name(facts: dict[str, Any]) -> str:
    """'Intel(R) Xeon(R) Processor', 2 cores -> 'intel-xeon-2c'; 'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3'.

    Ends the names of result files.
    """
    if "gpu" in facts:
        return "-".join(re.sub(r"[^\w\s-]", " ", facts["gpu"]).lower().split())
    words = re.sub(r"\(R\)|\(TM\)|@.*|\b(CPU|Processor)\b|[^\w\s-]", " ", facts["cpu"]).lower().split()
    return "-".join([*words, f"{facts['cores']}c"])


_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "instanttensor", "fastsafetensors", "numpy")


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Versions of the packages that are installed beside this interpreter, and its own."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str:
    """The commit of this checkout, with ``+changes`` if the library differs from it.

    A copy without git's folder is told by the variable OCTAVO_BENCH_COMMIT.
    """
    if told := os.environ.get("OCTAVO_BENCH_COMMIT"):
        return told
    if not (ROOT / ".git").exists():
        return "unknown"

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "src") else "")


if __name__ == "__main__":
    print(json.dumps({"commit": commit(), "machine": machine(Path.cwd()), "versions": versions()}))
