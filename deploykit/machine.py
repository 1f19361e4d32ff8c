"""This machine: what a table of timings must say of it. Standard library only, and free to import."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What decides which kernels an engine picks; everything else in /proc/cpuinfo is left out.
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
_ARM_FEATURES = ("asimd", "asimddp", "i8mm", "bf16", "sve")
_NVIDIA_SMI_TIMEOUT_S = 5.0


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def features() -> frozenset[str]:
    """Those of `FEATURES` (on ARM: of its own) that this CPU has; empty where the system does not tell."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return frozenset(flags & {*FEATURES, *_ARM_FEATURES})


def cpu_model() -> str:
    """The CPU's name; where a virtual machine hides it ('AMD EPYC'), with family and model, which tell the generation."""
    info = _cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info:
        name += f" (family {info['cpu family']} model {info.get('model', '?')})"
    return name


def threads() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """How many physical cores stand behind those CPUs (SMT siblings counted once)."""
    seen = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        siblings = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        seen.add(siblings or str(cpu))
    return len(seen) or threads()


def memory_bytes() -> int | None:
    """Bytes of memory: the machine's, or the control group's limit where that is lower; None where it cannot be read."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    limits = [_read(p) for p in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    return min([total, *(int(text) for text in limits if text and text.isdigit())])


def cpu_quota() -> float | None:
    """How many CPUs' worth of time the container may use (control group version 2 or 1); None without a quota."""
    v2 = (_read("/sys/fs/cgroup/cpu.max") or "").split()
    if len(v2) == 2 and v2[0].isdigit():
        return int(v2[0]) / int(v2[1])
    quota, period = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        return int(quota) / int(period)
    return None


def governor() -> str | None:
    """The frequency governor of the first CPU; None where it cannot be read (most virtual machines)."""
    return _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def turbo() -> bool | None:
    """Whether the clock may rise above its base; None where it cannot be read."""
    off = _read("/sys/devices/system/cpu/intel_pstate/no_turbo")
    if off is not None:
        return off == "0"
    boost = _read("/sys/devices/system/cpu/cpufreq/boost")
    return None if boost is None else boost == "1"


@functools.cache
def gpus() -> tuple[dict[str, str], ...]:
    """Name, driver version, compute capability and memory of each NVIDIA GPU, as nvidia-smi tells; empty without one."""
    keys = ("name", "driver_version", "compute_cap", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.split(", ") for line in done.stdout.strip().splitlines())
    return tuple(dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys))


def describe() -> dict[str, Any]:
    """This machine as a report and `doctor` show it (JSON values); None where the system does not tell."""
    return {
        "cpu": cpu_model(),
        "features": sorted(features()),
        "threads": threads(),
        "cores": cores(),
        "cpu_quota": cpu_quota(),
        "memory_bytes": memory_bytes(),
        "governor": governor(),
        "turbo": turbo(),
        "gpus": [dict(gpu) for gpu in gpus()],
        "os": _os_name(),
        "kernel": platform.release(),
        "arch": platform.machine(),
        "python": platform.python_version(),
        "fingerprint": fingerprint(),
    }


def fingerprint() -> str:
    """12 hex digits over what makes timings comparable: CPU, its features, CPUs usable, quota, memory class, GPUs.

    The memory class is its power of two (7.8 and 8.1 GB are the same machine after a kernel update); the kernel and the
    packages' versions are left out: they are recorded beside each measurement.
    """
    memory = memory_bytes()
    doc = {
        "cpu": cpu_model(),
        "features": sorted(features()),
        "threads": threads(),
        "cores": cores(),
        "quota": cpu_quota(),
        "memory_class": None if memory is None else round(math.log2(memory)),
        "gpus": [gpu["name"] for gpu in gpus()],
    }
    return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()[:12]


def machine_class(environment: Mapping[str, Any] | None = None) -> str:
    """What baselines are kept under: CPU, threads and fingerprint as one file name; of a report's environment, else of this
    machine. Machines of one class have comparable timings; a host's own name is not in it.

    Raises KeyError for an environment without a fingerprint.
    """
    found = describe() if environment is None else environment
    cpu = re.sub(r"\(.*?\)", "", str(found.get("cpu", "cpu"))).lower()
    slug = re.sub(r"[^a-z0-9]+", "-", cpu).strip("-")[:40].strip("-") or "cpu"
    return f"{slug}-{found.get('threads', 0)}t-{found['fingerprint']}"


def clash() -> str | None:
    """What is wrong when two wheels of ONNX Runtime share one module, and the fix; None when all is well."""
    kinds = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
    found = [name for name in kinds if _installed(name)]
    if len(found) < 2:
        return None
    return (
        f"{' and '.join(found)} are both installed and hold the same module, so either may be the one that runs; "
        f"pip uninstall -y {' '.join(found)} && pip install 'deploykit[cpu]' (or [gpu])"
    )


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _read(path: str) -> str | None:
    """A small file's text, stripped; None where it cannot be read or is empty."""
    try:
        return Path(path).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _os_name() -> str:
    for line in (_read("/etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.system()
