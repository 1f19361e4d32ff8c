"""Apache TVM on the CPU: our FP32 graph compiled to a shared library, with schedules of ours or found by a search.

A library takes any batch the graph takes. `BuildRequest.options`: 'tune' (seconds a search may take; 0: none), 'threads'.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import children
from deploykit.artifact import Artifact
from deploykit.backends import apache_tvm_arm as arm
from deploykit.backends import apache_tvm_choice as choice
from deploykit.backends import apache_tvm_compile as compiling
from deploykit.backends import apache_tvm_session as sessions
from deploykit.backends import apache_tvm_tuning as tuning
from deploykit.backends import installed, opened
from deploykit.errors import BackendFailed, InputError, MissingBackend
from deploykit.session import BuildRequest, Missing, OpenRequest, Session
from deploykit.signature import Signature

NAME = "tvm"
_PROOF_TOLERANCE = 1e-4  # of the largest output: FP32 sums in another order
_FP32_ONLY = "deploykit compiles TVM libraries from the FP32 graph only"
_REFUSED = {
    "fp16": f"{_FP32_ONLY}; FP16 is computed faster than FP32 only by CPUs with AVX-512 FP16",
    "int8": f"{_FP32_ONLY}; TVM 0.26 has no pass that turns Q/DQ pairs around a convolution into an integer one",
}


class Tvm:
    """The backend 'tvm'."""

    name = NAME
    opening_s = 2.5
    extra = NAME

    def missing(self) -> Missing | None:
        """Why it cannot build here: no TVM, or no C++ compiler to link with."""
        return installed.missing("tvm", self.extra) or compiling.no_linker("cpu")

    def cannot_run(self) -> Missing | None:
        """No TVM: what it builds for 'cpu' runs on this CPU, and needs no compiler any more."""
        return installed.missing("tvm", self.extra)

    def versions(self) -> dict[str, str]:
        """The installed TVM and its foreign-function layer."""
        return installed.versions("apache-tvm", "apache-tvm-ffi")

    def precisions(self) -> tuple[str, ...]:
        """fp32."""
        return ("fp32",)

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """Every precision but fp32, with the reason; a target whose cross compiler is not here."""
        if precision != "fp32":
            why = _REFUSED.get(precision, _FP32_ONLY)
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
        _require_search(request)
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
        """A session on a library, in this process, or over RPC where `request.options` has 'rpc' (HOST:PORT).

        Raises InputError for a batch it was not built for, MissingBackend for another CPU's library, BackendFailed.
        """
        opened.require_batch(engine.signature, request)
        if request.options.get("rpc"):
            return sessions.open_there(engine, request, str(request.options["rpc"]))
        if engine.device not in ("", "cpu"):
            raise MissingBackend(
                f"{engine.path.name} was compiled for {engine.device}; this machine cannot run it",
                "copy it to such a board, or run it there over RPC (docs/tvm-rpc.md)",
            )
        absent = installed.missing("tvm", self.extra) or compiling.same_cpu(engine.facts)
        if absent is not None:
            raise MissingBackend(f"{engine.path.name}: {absent.why}", absent.remedy)
        return sessions.open_here(engine, request)


def _libraries(
    artifact: Artifact, request: BuildRequest, machine: compiling.Machine, threads: int, folder: Path
) -> tuple[list[str], dict[str, Any]]:
    """The names of the libraries written, the first the engine's own, and what the manifest says of them.

    None is written where `_tuned` writes one for each batch under the same name.
    """
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
    for at, batch in enumerate(batches if not (reason and _budget_s(request) > 0) else []):
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


def _budget_s(request: BuildRequest) -> float:
    """Seconds that a search may take; 0: no search."""
    return float(request.options.get("tune", 0))


def _require_search(request: BuildRequest) -> None:
    """Raises, before anything is compiled, InputError for a search on another machine, MissingBackend without what it needs."""
    if _budget_s(request) <= 0:
        return
    if request.target != "cpu":
        raise InputError(
            "a search measures on the machine that the engine is for",
            "build it without --tune: the default schedules are used",
        )
    lacking = tuning.missing()
    if lacking is not None:
        raise MissingBackend(lacking.why, lacking.remedy)


def _tuned(
    artifact: Artifact, request: BuildRequest, machine: compiling.Machine, threads: int, folder: Path
) -> tuple[list[str], dict[str, Any]]:
    """The names of the libraries made by a search, one a batch, and what it found, by name; the log beside them."""
    budget = _budget_s(request)
    if budget <= 0:
        return [], {}
    database = tuning.database_folder(machine, threads)
    fixed = artifact.signature.fixed_batch
    batches = [fixed] if fixed is not None else list(dict.fromkeys(request.batches))
    files, found = [], {}
    for batch in batches:
        name = f"model-b{batch}.so"
        module = _lowered(artifact, machine, threads, batch)
        found[name], searched = tuning.search(module, machine, threads, budget / len(batches), database, folder)
        compiling.library(searched, machine, threads, folder / name)
        found[name] |= _against_default(artifact, request, machine, threads, batch, folder / name)
        files.append(name)
    (folder / "tuning.json").write_text(json.dumps(found, indent=1))
    return [*files, "tuning.json"], {"tuning": {name: {**each, "curve": each["curve"][-1]} for name, each in found.items()}}


def _against_default(
    artifact: Artifact, request: BuildRequest, machine: compiling.Machine, threads: int, batch: int, searched: Path
) -> dict[str, Any]:
    """How many times as fast as the library of default schedules the searched one is, both run in turns; where it is the slower
    one, the other is put in its place.

    Function by function the faster schedule was taken, each with its data in the caches; a whole model has them elsewhere.
    And a library for any batch can be faster than the same schedules for one (ResNet-18 at batch 1).
    """
    children.report_progress("tune: the searched and the default library in turns", 1.0)
    scratch = searched.with_name("default")
    scratch.mkdir()
    try:
        default = scratch / searched.name
        if (searched.parent / "model.so").is_file():
            shutil.copyfile(searched.parent / "model.so", default)
        else:
            compiling.library(_lowered(artifact, machine, threads, batch), machine, threads, default)
        feeds = _random_feeds(artifact.signature, batch, request)
        asked = OpenRequest("fp32", batch, threads, request.shapes)
        opened_both = [
            sessions.open_here(Artifact(path, NAME, "fp32", artifact.signature, "tuned"), asked) for path in (default, searched)
        ]
        ratio, slower = choice.times_as_fast(*(session.bind(feeds) for session in opened_both))
        for session in opened_both:
            session.close()
        if slower:
            default.replace(searched)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"over_default": 1.0 if slower else ratio, **({"searched_over_default": ratio} if slower else {})}


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
        session = sessions.open_here(here, OpenRequest("fp32", batch, 1, request.shapes))
        wanted = session.infer(feeds)
        session.close()
        children.report_progress("run under qemu", 0.8)
        library, _ = sessions.library_for(made, batch)
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


BACKEND = Tvm()
