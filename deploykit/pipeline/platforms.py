"""Which engine runs on which platform, with which runtime, and what stands in for one that doesn't."""

from __future__ import annotations

import platform as machine
from collections.abc import Mapping
from dataclasses import dataclass

from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.errors import InputError, UnknownName

PLATFORMS = ("android", "ios", "linux-arm", "linux-x86")
_LINUX = ("linux-arm", "linux-x86")
_ARM_TARGETS = ("linux-arm", "aarch64", "arm")
_X86_TARGETS = ("x86", "amd64", "i386", "i486", "i586", "i686")


@dataclass(frozen=True)
class Runtime:
    """A runtime: its title, the platforms it has packages for, its Python distributions, the engine's own first."""

    title: str
    platforms: tuple[str, ...]
    distributions: tuple[str, ...]


RUNTIMES: Mapping[str, Runtime] = {
    "executorch": Runtime("ExecuTorch", PLATFORMS, ("executorch", "torch")),
    "litert": Runtime("LiteRT", PLATFORMS, ("ai-edge-litert",)),
    "onnxruntime": Runtime("ONNX Runtime", PLATFORMS, ("onnxruntime",)),
    "openvino": Runtime("OpenVINO", _LINUX, ("openvino",)),
    "tvm": Runtime("Apache TVM", _LINUX, ("apache-tvm",)),
}


def require(engine: Artifact, backend: str, platform: str) -> Runtime:
    """The runtime of the engine. Raises UnknownName for a platform that isn't known, InputError where the engine cannot run
    there, with the closest one that can."""
    if platform not in PLATFORMS:
        raise UnknownName("platform", platform, PLATFORMS)
    runtime = RUNTIMES.get(backend)
    if runtime is None:
        raise InputError(f"{backend} engines cannot be packaged for {platform}: {_why_not(backend)}", closest(engine, platform))
    if platform not in runtime.platforms:
        raise InputError(f"{runtime.title} has no packages for {platform}", closest(engine, platform))
    if backend == "tvm":
        _require_machine(engine, platform)
    return runtime


def _why_not(backend: str) -> str:
    if backend.startswith("torch"):
        return "they are the PyTorch source itself, and need all of PyTorch"
    if "tensorrt" in backend or "cuda" in backend:
        return "they run on NVIDIA GPUs"
    return "no package is known for their runtime"


def _require_machine(engine: Artifact, platform: str) -> None:
    """Raises InputError for a compiled library of another processor than the platform's."""
    cross = engine.device.startswith(_ARM_TARGETS)
    made = str(engine.facts.get("triple") or (engine.device if cross else machine.machine()))
    wanted = _ARM_TARGETS if platform == "linux-arm" else _X86_TARGETS
    if not made.lower().startswith(wanted):
        target = "linux-arm64, or on such a board for cpu" if platform == "linux-arm" else "cpu on an x86 machine"
        raise InputError(f"{engine.path.name} was compiled for {made}, not for {platform}", f"build it for the target {target}")


def closest(engine: Artifact, platform: str) -> str:
    """The runtime that does run there, in the engine's precision where one has it, and the command that makes it."""
    fitting = [name for name, runtime in RUNTIMES.items() if platform in runtime.platforms]
    same = [name for name in fitting if backends.get(name).unsupported(engine.precision, "cpu") is None]
    name, precision = (same[0], engine.precision) if same else (fitting[0], "fp32")
    model = str(engine.options.get("model", "SOURCE"))
    return (
        f"{RUNTIMES[name].title} {precision} runs there: deploykit run {model} --backend {name} --precision {precision} -o out "
        f"(with the same --weights and --data), then package its engine"
    )
