"""Apache TVM on the CPU: our FP32 graph compiled to a shared library, with schedules of ours or found by a search.

A library takes any batch the graph takes. `BuildRequest.options`: 'tune' (seconds a search may take; 0: none), 'threads'.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import children
from deploykit.artifact import Artifact
from deploykit.backends import apache_tvm_arm as arm
from deploykit.backends import apache_tvm_compile as compiling
from deploykit.backends import apache_tvm_tuning as tuning
from deploykit.backends import installed, opened
from deploykit.errors import BackendFailed, InputError, MissingBackend
from deploykit.session import BuildRequest, Missing, OpenRequest, Session
from deploykit.signature import Feeds, Outputs, Signature

NAME = "tvm"
_PROOF_TOLERANCE = 1e-4  # of the largest output: FP32 sums in another order
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
        more, found = _tuned(artifact, request, machine, threads, folder)
        files, facts = [*files, *more], {**facts, **found}
        made = Artifact(
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
        return (
            made if request.target == "cpu" else replace(made, facts={**made.facts, **_proven(made, request, artifact, folder)})
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
    files: list[str] = []
    plain: dict[str, list[str]] = {}
    for at, batch in enumerate(batches):
        children.report_progress("compile", at / len(batches))
        name = "model.so" if batch is None else f"model-b{batch}.so"
        module = modules.get(batch) or _lowered(artifact, machine, threads, batch)
        plain[name] = list(compiling.library(module, machine, threads, folder / name))
        files.append(name)
    facts: dict[str, Any] = {"threads": threads, "unscheduled": {k: v for k, v in plain.items() if v}}
    if reason:
        facts |= {"batches": [b for b in batches if b is not None], "notes": [f"one library a batch: {reason}"]}
    return files, facts


def _lowered(artifact: Artifact, machine: compiling.Machine, threads: int, batch: int | None) -> Any:
    return compiling.lowered(compiling.imported(artifact.path, artifact.signature, batch), machine.target(threads))


def _tuned(
    artifact: Artifact, request: BuildRequest, machine: compiling.Machine, threads: int, folder: Path
) -> tuple[list[str], dict[str, Any]]:
    """The names of the libraries made by a search, one a batch, and what it found, by name; the log beside them."""
    budget = float(request.options.get("tune", 0))
    if budget <= 0:
        return [], {}
    if machine.name != "cpu":
        raise InputError(
            "a search measures on the machine that the engine is for",
            "tune over RPC to a board (docs/tvm-rpc.md), or build without --tune",
        )
    database = tuning.database_folder(machine, threads)
    fixed = artifact.signature.fixed_batch
    batches = [fixed] if fixed is not None else list(dict.fromkeys(request.batches))
    files, found = [], {}
    for batch in batches:
        module = _lowered(artifact, machine, threads, batch)
        name = f"model-b{batch}.so"
        found[name] = tuning.search(module, machine, threads, budget / len(batches), database)
        compiling.library(tuning.applied(module, machine, threads, database), machine, threads, folder / name)
        files.append(name)
    (folder / "tuning.json").write_text(json.dumps(found, indent=1))
    return [*files, "tuning.json"], {"tuning": {name: {**each, "curve": each["curve"][-1]} for name, each in found.items()}}


def _proven(made: Artifact, request: BuildRequest, fp32: Artifact, folder: Path) -> dict[str, Any]:
    """What running an ARM library under qemu showed: its largest error against the same graph compiled for this CPU, by
    our own session; or why it could not be run. Raises BackendFailed for outputs that differ."""
    absent = arm.missing()
    if absent is not None:
        return {"notes": [f"outputs not proven: {absent}"]}
    batch = made.signature.fixed_batch or request.batches[0]
    scratch = folder / "proof"
    scratch.mkdir()
    try:
        files, facts = _libraries(fp32, BuildRequest("fp32", "cpu", (batch,), request.shapes), compiling.here(), 1, scratch)
        here = Artifact(scratch / files[0], NAME, "fp32", made.signature, "proof", facts={**facts, "cpu": ""})
        feeds = _random_feeds(made.signature, batch, request)
        session = BACKEND.open(here, OpenRequest("fp32", batch, 1, request.shapes))
        wanted = session.infer(feeds)
        session.close()
        children.report_progress("run under qemu", 0.8)
        library, _ = _library_for(made, batch)
        found = arm.outputs(library, made.signature, feeds, {k: v.shape for k, v in wanted.items()}, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    worst = max(_distance(found[name], wanted[name]) for name in wanted)
    if not worst <= _PROOF_TOLERANCE:
        raise BackendFailed(
            f"under qemu the library's outputs differ from this CPU's by {worst:.1e} of the largest value",
            "report it with the model: the code made for ARM is wrong",
        )
    return {
        "proof": {"emulator": "qemu-user", "batch": batch, "max_error": worst, "relative_to": "largest output"},
        "notes": [f"outputs proven under qemu at batch {batch}: max error {worst:.1e} of the largest value"],
    }


def _random_feeds(signature: Signature, batch: int, request: BuildRequest) -> dict[str, Any]:
    """Seeded inputs: normal floats, zeros for integers (which may be indices)."""
    rng = np.random.default_rng(0)
    shapes = signature.shapes(batch, request.shapes)
    return {
        s.name: (rng.normal(size=shapes[s.name]) if s.dtype.startswith("float") else np.zeros(shapes[s.name])).astype(s.dtype)
        for s in signature.inputs
    }


def _distance(found: Any, wanted: Any) -> float:
    """Largest absolute difference over the largest reference value."""
    if not wanted.size:
        return 0.0
    gap = float(np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max())
    return gap / max(float(np.abs(wanted).max()), 1e-30)


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
