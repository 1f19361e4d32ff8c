"""torch.compile (Inductor) on the CPU: FP32 and BF16, static shapes at the session's batch."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact
from deploykit.backends import installed, opened, torch_source
from deploykit.backends.torch_eager import autocast, without_bf16
from deploykit.children import report_progress
from deploykit.errors import BackendFailed, DeploykitError
from deploykit.session import LAYOUTS, BuildRequest, Missing, OpenRequest, Session
from deploykit.signature import Signature

NAME = "torch-compile"


class TorchCompile:
    """The backend 'torch-compile'."""

    name = NAME
    opening_s = 15.0
    extra = "torch"
    layouts = LAYOUTS

    def missing(self) -> Missing | None:
        """Why it cannot compile here: no torch, no C++ compiler, no Python headers (its kernels are a Python extension)."""
        lacking = installed.missing("torch", self.extra)
        if lacking is not None:
            return lacking
        if compiler() is None:
            return Missing("torch.compile needs a C++ compiler at run time, and there is none", "apt-get install g++")
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return Missing("torch.compile needs Python's headers (Python.h) at run time", "apt-get install python3-dev")
        return None

    def cannot_run(self) -> Missing | None:
        """The same as `missing`: it compiles when a session is opened."""
        return self.missing()

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
        """The source's description; it is compiled when a session opens, at that session's batch and threads."""
        return torch_source.copy(artifact, request, folder, f"build-{NAME}", self.versions())

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """The module compiled at the request's batch: 15 to 20 s every time, since Inductor's cache on disk takes no graph with packed
        weights (torch 2.14.1: "Bypassing FX Graph Cache because 'mkldnn tensors unpickleable'")."""
        import torch

        opened.require_batch(engine.signature, request)
        shapes = engine.signature.shapes(request.batch, request.shapes)
        source = torch_source.load(engine)
        laid_out = torch_source.lay_out(source.module, request)
        torch.set_num_threads(request.threads)  # before compiling: Inductor writes the number into its loops
        step = autocast(source.module) if request.precision == "bf16" else source.module
        report_progress(f"compiling at batch {request.batch}", 0.2)
        compiled = _compile(step, engine.signature, shapes)
        report_progress("compiled", 1.0)
        notes = (*(("autocast to BF16",) if request.precision == "bf16" else ()), *laid_out)
        return torch_source.TorchSession(compiled, source, engine.signature, request, request.precision, notes, static=True)


def compiler() -> str | None:
    """The C++ compiler Inductor can use: $CXX, else g++, clang++ or c++; None when none is on the path."""
    named = os.environ.get("CXX")
    return next((c for c in (named, "g++", "clang++", "c++") if c and shutil.which(c)), None)


def _compile(step: Any, signature: Signature, shapes: dict[str, tuple[int, ...]]) -> Any:
    """`step` compiled by two runs on zeros (the compiler never looks at values).

    Freezing makes weights constants and packs them for the kernels: BF16 autocast 10.1 ms with it, 15.3 without, and 15.3
    with the weights cast to BF16 instead; FP32 26.0 and 26.8 ms (ResNet-18, batch 1, 2 cores of Zen 4, torch 2.14.1). The
    setting must stand while Dynamo traces; given as an option of torch.compile it changed nothing.
    """
    import torch
    import torch._inductor.config as inductor

    tensors = {s.name: torch.zeros(shapes[s.name], dtype=getattr(torch, s.dtype)) for s in signature.inputs}
    try:
        with inductor.patch({"freezing": True, "cpp.cxx": (None, compiler())}), torch.inference_mode():
            compiled: Any = torch.compile(step, dynamic=False)
            for _ in range(2):
                compiled(**tensors)
    except DeploykitError:
        raise
    except Exception as exc:
        raise BackendFailed(
            f"torch.compile failed: {type(exc).__name__}: {opened.first_line(exc)}", "leave torch-compile out for this model"
        ) from exc
    return compiled


BACKEND = TorchCompile()
