"""Apache TVM on the CPU: our FP32 graph compiled to a shared library, with schedules of ours or found by a search.

A library takes any batch the graph takes. `BuildRequest.options`: 'tune' (seconds a search may take; 0: none), 'threads'.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import children
from deploykit.artifact import Artifact
from deploykit.backends import apache_tvm_compile as compiling
from deploykit.backends import installed, opened
from deploykit.errors import BackendFailed, InputError, MissingBackend
from deploykit.session import BuildRequest, Missing, OpenRequest, Session
from deploykit.signature import Feeds, Outputs, Signature

NAME = "tvm"
_REFUSED = {
    "fp16": "no x86 CPU below Sapphire Rapids computes in FP16, and TVM would compute it in FP32 with conversions",
    "bf16": "TVM 0.26 emits no BF16 dot products for x86 from a graph of ours",
    "int8": "TVM 0.26's ONNX front end turns Q/DQ pairs into float arithmetic",
    "int8-dynamic": "TVM 0.26 has no dynamic quantization",
    "mixed": "TVM 0.26's ONNX front end turns Q/DQ pairs into float arithmetic",
}


class Tvm:
    """The backend 'tvm'."""

    name = NAME
    extra = NAME

    def missing(self) -> Missing | None:
        """Why it cannot build here: no TVM, or no C++ compiler to link with."""
        return installed.missing("tvm", self.extra) or compiling.no_linker("cpu")

    def cannot_run(self) -> Missing | None:
        """None: what it builds for 'cpu' runs on this CPU."""
        return None

    def versions(self) -> dict[str, str]:
        """The installed TVM and its foreign-function layer."""
        return installed.versions("apache-tvm", "apache-tvm-ffi")

    def precisions(self) -> tuple[str, ...]:
        """fp32."""
        return ("fp32",)

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """Every precision but fp32, with the reason; a target whose cross compiler is not here."""
        if precision != "fp32":
            why = _REFUSED.get(precision, f"TVM has no {precision} path")
            return Missing(why, "use fp32 here, or --backend onnxruntime or openvino")
        if target == compiling.ARM:
            return compiling.no_linker(target)
        return installed.only_cpu("TVM", target)

    def targets(self) -> tuple[str, ...]:
        """The CPU that is here."""
        return ("cpu",)

    def all_targets(self) -> tuple[str, ...]:
        """The CPU that is here, and 64-bit ARM with Linux."""
        return ("cpu", compiling.ARM)

    def graph(self, precision: str) -> str:  # noqa: ARG002 - the protocol's
        """The FP32 graph."""
        return "fp32"

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """The library `folder/model.so` for any batch the graph takes, or, where TVM cannot keep the batch a symbol, one for
        each batch asked for (`model-bN.so`).

        Raises MissingBackend, ModelError, BackendFailed naming an operator that TVM lacks, InputError for an unknown option.
        """
        absent = self.missing() or self.unsupported(request.precision, request.target)
        if absent is not None:
            raise MissingBackend(absent.why, absent.remedy)
        machine = compiling.arm() if request.target == compiling.ARM else compiling.here()
        threads = int(request.options.get("threads", 0)) or children.available_threads()
        files, facts = _libraries(artifact, request, machine, threads, folder)
        return Artifact(
            path=folder / files[0],
            format=NAME,
            precision="fp32",
            signature=artifact.signature,
            stage=f"build-{NAME}",
            parent=artifact.sha256 or None,
            options={"target": request.target, **request.options},
            versions=self.versions(),
            device=request.target,
            facts={"cpu": machine.cpu, "triple": machine.triple, "linker": compiling.link_version(machine.linker), **facts},
            companions=dict.fromkeys(files[1:], ""),
        )

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """A session on a library. The number of threads is the process's: the session opened last sets it.

        Raises InputError for a batch it was not built for, MissingBackend for another CPU's library, BackendFailed.
        """
        opened.require_batch(engine.signature, request)
        if engine.device not in ("", "cpu"):
            raise MissingBackend(
                f"{engine.path.name} was compiled for {engine.device}; this machine cannot run it",
                "copy it to such a board, or run it there over RPC (docs/tvm-rpc.md)",
            )
        absent = installed.missing("tvm", self.extra) or compiling.same_cpu(engine.facts)
        if absent is not None:
            raise MissingBackend(f"{engine.path.name}: {absent.why}", absent.remedy)
        path, notes = _library_for(engine, request.batch)
        threads = _use_threads(request.threads)
        return TvmSession(_machine_of(path), engine.signature, request, threads, notes)


def _libraries(
    artifact: Artifact, request: BuildRequest, machine: compiling.Machine, threads: int, folder: Path
) -> tuple[list[str], dict[str, Any]]:
    """The names of the libraries written, the first the engine's own, and what the manifest says of them."""
    children.report_progress("import", 0.0)
    batches: list[int | None] = [None]
    reason = ""
    modules: dict[int | None, Any] = {}
    try:
        modules = {None: compiling.lowered(compiling.imported(artifact.path, artifact.signature, None), machine.target(threads))}
    except BackendFailed as exc:
        if artifact.signature.batch_symbol is None or "no converter" in exc.message:
            raise
        reason, batches = exc.message, list(dict.fromkeys(request.batches))
    files, plain = [], {}
    for at, batch in enumerate(batches):
        children.report_progress("compile", (at + 0.3) / len(batches))
        module = modules.get(batch)
        if module is None:
            module = compiling.lowered(compiling.imported(artifact.path, artifact.signature, batch), machine.target(threads))
        name = "model.so" if batch is None else f"model-b{batch}.so"
        plain[name] = list(compiling.library(module, machine, threads, folder / name))
        files.append(name)
    facts: dict[str, Any] = {"threads_tuned_for": threads, "unscheduled": {k: v for k, v in plain.items() if v}}
    if reason:
        facts |= {"batches": [b for b in batches if b is not None], "notes": [f"one library a batch: {reason}"]}
    return files, facts


def _library_for(engine: Artifact, batch: int) -> tuple[Path, tuple[str, ...]]:
    """The library that runs a batch, and notes on it. Raises InputError where none was built for it."""
    exact = f"model-b{batch}.so"
    built = engine.facts.get("batches")
    if built and batch not in built:
        raise InputError(
            f"{engine.path.name} was built for batch {', '.join(map(str, built))}, not for {batch}",
            f"build it again with --batch {batch}",
        )
    if exact == engine.path.name or exact in engine.companions:
        return engine.path.with_name(exact), ("schedules found by tuning",) if engine.facts.get("tuning") else ()
    if engine.facts.get("tuning"):
        return engine.path, (f"not tuned at batch {batch}: default schedules",)
    return engine.path, ("not tuned: default schedules",)


def _use_threads(threads: int) -> int:
    """Sets how many threads TVM's pool uses in this process; returns what it says it uses.

    Left alone, the pool has one thread a physical core, half of what /proc/cpuinfo lists whether or not these are SMT
    siblings (`MaxConcurrency`), fixed when it is first used; and each is pinned to a core of its own.
    """
    allowed = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("TVM_NUM_THREADS", str(len(allowed)))
    import tvm

    share_all = -3  # kSpecifyThreadShareAllCore: no thread is pinned to one core
    tvm.get_global_func("runtime.config_threadpool")(share_all, threads, [str(cpu) for cpu in allowed])
    return int(tvm.get_global_func("runtime.NumThreads")())


def _is_whole(path: Path) -> bool:
    """Whether the file is a 64-bit ELF file down to its section table, which stands at its end: the dynamic loader reads a
    truncated one through a memory map, and dies."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return False
    offset = int(struct.unpack_from("<Q", head, 40)[0])
    size, count = struct.unpack_from("<HH", head, 58)
    return offset > 0 and offset + size * count <= path.stat().st_size


def _machine_of(path: Path) -> Any:
    """TVM's virtual machine on a library. Raises BackendFailed for a file that is none, or another TVM's."""
    import tvm
    from tvm import relax

    if not _is_whole(path):
        raise BackendFailed(f"{path.name} is not a whole shared library", "build the engine again")
    try:
        return relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    except (RuntimeError, ValueError, AttributeError, OSError) as exc:
        raise BackendFailed(f"TVM cannot load {path.name}: {compiling.why(exc)}", "build the engine again") from exc


class TvmSession:
    """A loaded library and its virtual machine."""

    def __init__(self, machine: Any, signature: Signature, request: OpenRequest, threads: int, notes: tuple[str, ...]) -> None:
        self._machine: Any | None = machine
        self._request = request
        self.signature = signature
        self.precision = "fp32"
        self.device = "cpu"
        self.threads = threads
        self.notes = notes

    def infer(self, feeds: Feeds) -> Outputs:
        """Outputs by name, copied out of the engine. Raises InputError for feeds that do not fit, BackendFailed."""
        values = self._run(self._tensors(feeds))
        return {spec.name: np.array(v.numpy()) for spec, v in zip(self.signature.outputs, values, strict=True)}

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """One run on inputs that lie in TVM's memory; its outputs lie in the host's when it returns."""
        tensors = self._tensors(feeds)
        return lambda: self._run(tensors)

    def close(self) -> None:
        """Frees the engine; a second time does nothing."""
        self._machine = None

    def _tensors(self, feeds: Feeds) -> list[Any]:
        import tvm

        if self._machine is None:
            raise BackendFailed("this TVM session is closed", "open the engine again")
        return [tvm.runtime.tensor(a) for a in opened.ready(self.signature, self._request, feeds).values()]

    def _run(self, tensors: list[Any]) -> list[Any]:
        if self._machine is None:
            raise BackendFailed("this TVM session is closed", "open the engine again")
        try:
            found = self._machine["main"](*tensors)
        except (RuntimeError, ValueError, TypeError) as exc:
            raise BackendFailed(f"TVM failed while running: {compiling.why(exc)}", "check the inputs' values and shapes") from exc
        return [found] if len(self.signature.outputs) == 1 and not hasattr(found, "__len__") else list(found)


BACKEND = Tvm()
