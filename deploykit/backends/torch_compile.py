"""torch.compile (Inductor) on the CPU: FP32 and BF16, compiled ahead of time for each batch that is built for.

A package opens in a third of a second where `torch.compile` takes 6 to 20 s in each process (Inductor's cache on disk takes no graph
with packed weights), needs neither the model's code nor a compiler, and has no guards to check in each call.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit import machine
from deploykit.artifact import Artifact
from deploykit.backends import installed, opened, torch_compile_package, torch_source
from deploykit.backends.torch_eager import without_bf16
from deploykit.children import report_progress
from deploykit.errors import BackendFailed, MissingBackend
from deploykit.session import LAYOUTS, BuildRequest, Missing, OpenRequest, Session

NAME = "torch-compile"
AHEAD = 4  # more batches than these are a sweep's, which opens few of them: they are compiled when opened


class TorchCompile:
    """The backend 'torch-compile'."""

    name = NAME
    opening_s = 4.0
    extra = "torch"
    layouts = LAYOUTS

    def missing(self) -> Missing | None:
        """Why it cannot compile here: no torch, no C++ compiler, no Python headers (its kernels are a Python extension)."""
        lacking = installed.missing("torch", self.extra)
        if lacking is not None:
            return lacking
        if compiler() is None:
            return Missing("torch.compile needs a C++ compiler, and there is none", "apt-get install g++")
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return Missing("torch.compile needs Python's headers (Python.h)", "apt-get install python3-dev")
        return None

    def cannot_run(self) -> Missing | None:
        """No torch: a compiler is only needed for what was not compiled ahead (see `open`)."""
        return installed.missing("torch", self.extra)

    def versions(self) -> dict[str, str]:
        """The installed torch."""
        return torch_source.versions()

    def precisions(self) -> tuple[str, ...]:
        """fp32, and bf16 where the CPU computes in it."""
        return ("fp32", "bf16") if without_bf16() is None else ("fp32",)

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """Anything but fp32 and bf16, bf16 on a CPU without it, any target but 'cpu'."""
        if precision not in ("fp32", "bf16"):
            return Missing(f"torch.compile has no {precision} row here", "use onnxruntime or openvino")
        if precision == "bf16" and (lacking := without_bf16()) is not None:
            return lacking
        return installed.only_cpu("torch.compile", target)

    def targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def all_targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def graph(self, precision: str) -> str:  # noqa: ARG002 - the same for all
        """The PyTorch source itself."""
        return "source"

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """The source's description, and beside it a package for each of up to four batches that PyTorch can make one for.
        Raises what loading the source raises."""
        engine = torch_source.copy(artifact, request, folder, f"build-{NAME}", self.versions())
        fixed = engine.signature.fixed_batch
        batches = (fixed,) if fixed is not None else tuple(sorted(set(request.batches)))
        if len(batches) > AHEAD:
            return engine
        source = torch_source.load(engine)
        packages: dict[str, str] = {}
        refused = ""
        for position, batch in enumerate(batches):
            report_progress(f"compiling at batch {batch}", position / len(batches))
            opening = OpenRequest(request.precision, batch, machine.threads(), request.shapes)
            path = folder / f"{engine.path.stem}.batch{batch}.pt2"
            try:
                _compile(source, engine, opening, path)
            except BackendFailed as exc:  # not every module can be packaged: `open` compiles it, and says why it had to
                refused = exc.message
                path.unlink(missing_ok=True)
                continue
            packages[_key(engine, opening)] = path.name
        facts = {**engine.facts, "packages": packages, "not_packaged": refused, "cpu_features": sorted(machine.features())}
        return replace(engine, facts=facts, companions={**engine.companions, **dict.fromkeys(packages.values(), "")})

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """The package for these shapes; where the engine has none that fits this machine, compiled now (10 to 30 s), which a note says.
        Raises MissingBackend where that needs a compiler and there is none, and what compiling raises."""
        import torch

        opened.require_batch(engine.signature, request)
        torch_source.spec_in(engine.path)  # a damaged engine is an error, also where its packages are whole
        path = _package(engine, request)
        notes: tuple[str, ...] = ("autocast to BF16",) if request.precision == "bf16" else ()
        torch.set_num_threads(request.threads)
        if path is not None:
            compiled = torch_compile_package.load(path)
        else:
            if (lacking := self.missing()) is not None:
                raise MissingBackend(f"{NAME} {request.precision}: {lacking.why}", lacking.remedy)
            report_progress(f"compiling at batch {request.batch}", 0.2)
            source = torch_source.load(engine)
            why = f" (no package: {refused})" if (refused := engine.facts.get("not_packaged")) else ""
            notes = (*notes, *torch_source.lay_out(source.module, request), f"compiled when it was opened{why}")
            compiled = _now(source, engine, request)
        report_progress("opened", 1.0)
        inputs = tuple(s.name for s in engine.signature.inputs)
        outputs = tuple(s.name for s in engine.signature.outputs)
        return torch_source.TorchSession(
            _by_name(compiled, inputs), outputs, engine.signature, request, request.precision, notes, static=True
        )


def _by_name(compiled: Callable[..., Any], inputs: tuple[str, ...]) -> Callable[..., Any]:
    return lambda **tensors: compiled(*[tensors[name] for name in inputs])


def _key(engine: Artifact, request: OpenRequest) -> str:
    """What a package is compiled for: its inputs' shapes."""
    shapes = engine.signature.shapes(request.batch, request.shapes)
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _package(engine: Artifact, request: OpenRequest) -> Path | None:
    """The engine's package for these shapes, where this CPU and this torch can run it."""
    name = engine.facts.get("packages", {}).get(_key(engine, request))
    fits = (
        request.precision == engine.precision
        and request.options.get("layout", LAYOUTS[0]) == LAYOUTS[0]
        and dict(engine.versions) == torch_source.versions()
        and set(engine.facts.get("cpu_features", ())) <= machine.features()
    )
    return engine.path.parent / name if name is not None and fits else None


def _now(source: torch_source.LoadedSource, engine: Artifact, request: OpenRequest) -> Callable[..., Any]:
    """Compiled in this process: as a package, unless the build could make none, and by `torch.compile` where that fails."""
    if engine.facts.get("packages") != {}:
        try:
            with tempfile.TemporaryDirectory(prefix="deploykit-") as name:
                _compile(source, engine, request, Path(name) / "engine.pt2")
                return torch_compile_package.load(Path(name) / "engine.pt2")
        except BackendFailed:
            report_progress("compiling again, in this process alone", 0.5)
    step, inputs = _traced(source, engine, request)
    return torch_compile_package.just_in_time(step, inputs, compiler(), bf16=request.precision == "bf16")


def _compile(source: torch_source.LoadedSource, engine: Artifact, request: OpenRequest, path: Path) -> None:
    """Compiles the source's module for the request's batch and shapes into a package at `path`."""
    step, inputs = _traced(source, engine, request)
    torch_compile_package.compile_to(path, step, inputs, compiler(), bf16=request.precision == "bf16")


def _traced(source: torch_source.LoadedSource, engine: Artifact, request: OpenRequest) -> tuple[Any, tuple[Any, ...]]:
    """The module with inputs by position, and inputs of the request's shapes."""
    import torch

    shapes = engine.signature.shapes(request.batch, request.shapes)
    inputs = tuple(torch.zeros(shapes[s.name], dtype=getattr(torch, s.dtype)) for s in engine.signature.inputs)
    return torch_source.positional(source, engine.signature), inputs


def compiler() -> str | None:
    """The C++ compiler Inductor can use: $CXX, else g++, clang++ or c++; None when none is on the path."""
    named = os.environ.get("CXX")
    return next((c for c in (named, "g++", "clang++", "c++") if c and shutil.which(c)), None)


BACKEND = TorchCompile()
