"""The machine's description: honest about what cannot be read, a fingerprint that changes with what matters."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploykit import machine


def test_describes_this_machine_in_json_values() -> None:
    doc = json.loads(json.dumps(machine.describe()))
    assert doc["cpu"]
    assert 1 <= doc["cores"] <= doc["threads"]
    assert doc["memory_bytes"] > 1 << 28
    assert doc["python"].startswith("3.")
    assert doc["fingerprint"] == machine.fingerprint()


def test_features_are_those_of_proc_cpuinfo() -> None:
    text = Path("/proc/cpuinfo").read_text()
    flags = next((line.split() for line in text.splitlines() if line.startswith(("flags", "Features"))), [])
    assert machine.features() <= set(flags)
    for name in ("avx2", "avx512_vnni", "amx_int8"):
        assert (name in machine.features()) == (name in flags)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("cpu_model", lambda: "another CPU"),
        ("features", lambda: frozenset({"avx2"})),
        ("threads", lambda: 64),
        ("cpu_quota", lambda: 1.5),
        ("memory_bytes", lambda: 1 << 43),
        ("gpus", lambda: ({"name": "T4"},)),
    ],
)
def test_the_fingerprint_changes_with_what_makes_timings_comparable(
    name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = machine.fingerprint()
    monkeypatch.setattr(machine, name, other)
    assert machine.fingerprint() != before


def test_the_fingerprint_is_stable() -> None:
    assert machine.fingerprint() == machine.fingerprint()
    assert len(machine.fingerprint()) == 12


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"/sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_the_containers_cpu_quota(files: dict[str, str], quota: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", files.get)
    assert machine.cpu_quota() == quota


def test_a_memory_limit_of_the_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", {"/sys/fs/cgroup/memory.max": "1000000"}.get)
    assert machine.memory_bytes() == 1000000
    monkeypatch.setattr(machine, "_read", {"/sys/fs/cgroup/memory.max": "max"}.get)
    assert (machine.memory_bytes() or 0) > 1000000


@pytest.mark.parametrize(
    ("files", "on"),
    [
        ({"/sys/devices/system/cpu/intel_pstate/no_turbo": "1"}, False),
        ({"/sys/devices/system/cpu/intel_pstate/no_turbo": "0"}, True),
        ({"/sys/devices/system/cpu/cpufreq/boost": "1"}, True),
        ({}, None),
    ],
)
def test_turbo_is_unknown_where_it_cannot_be_read(
    files: dict[str, str], on: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_read", files.get)
    assert machine.turbo() is on


def test_gpus_as_nvidia_smi_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def smi(command: list[str], **kwargs: Any) -> Any:
        return subprocess.CompletedProcess(command, 0, "Tesla T4, 580.1, 7.5, 15360 MiB\n", "")

    machine.gpus.cache_clear()
    monkeypatch.setattr(subprocess, "run", smi)
    try:
        assert machine.gpus()[0] == {
            "name": "Tesla T4",
            "driver_version": "580.1",
            "compute_cap": "7.5",
            "memory.total": "15360 MiB",
        }
    finally:
        machine.gpus.cache_clear()


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 5), subprocess.CalledProcessError(9, "x")]
)
def test_no_gpu_without_an_nvidia_smi_that_answers(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def smi(*args: Any, **kwargs: Any) -> Any:
        raise error

    machine.gpus.cache_clear()
    monkeypatch.setattr(subprocess, "run", smi)
    try:
        assert machine.gpus() == ()
    finally:
        machine.gpus.cache_clear()


@pytest.mark.parametrize(
    ("there", "clashes"),
    [((), False), (("onnxruntime",), False), (("onnxruntime-gpu",), False), (("onnxruntime", "onnxruntime-gpu"), True)],
)
def test_two_wheels_of_onnx_runtime_clash(there: tuple[str, ...], clashes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in there:
            return "1.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = machine.clash()
    assert (said is not None) == clashes
    if said:
        assert "pip uninstall -y onnxruntime onnxruntime-gpu" in said
