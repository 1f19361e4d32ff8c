"""TensorRT-RTX: engines built ahead of time for a GPU generation, on any machine; they run on an NVIDIA GPU only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import TracebackType

from deploykit import cache_folder, children
from deploykit.artifact import Artifact, Json, write_atomically
from deploykit.children import has_module
from deploykit.errors import BackendFailed, MissingBackend, UnknownName
from deploykit.session import BuildRequest, Missing, OpenRequest, Session
from deploykit.signature import Signature
from deploykit.trt import account, alike, builder, gpu, layers, parser_graph, plan, plan_header, profiles

_GRAPHS = {"fp32": "fp32", "fp16": "fp16", "int8": "int8-tensorrt", "mixed": "int8-tensorrt"}
ENGINE_NAME = "model.engine"
_VERIFY_UP_TO_S = 20.0  # a second build beside the first is waited for where it costs no more than this
_VERIFY_UP_TO_BYTES = 500_000_000


class TensorRtRtx:
    """The backend 'tensorrt-rtx' of `pip install 'deploykit[rtx]'`."""

    name = "tensorrt-rtx"
    extra = "rtx"

    def missing(self) -> Missing | None:
        """Why no engine can be built here; building needs the package and no GPU."""
        if not has_module("tensorrt_rtx"):
            return Missing("the package tensorrt-rtx is not installed", "pip install 'deploykit[rtx]'")
        return None

    def cannot_run(self) -> Missing | None:
        """Why an engine cannot run here: no GPU, or nothing to reach it with."""
        if not gpu.found():
            return Missing(
                "no NVIDIA GPU with a CUDA driver was found here",
                "needs an NVIDIA GPU with compute capability 7.5 or later (T4, RTX 20 and newer): copy the engine and its "
                "manifest there and run `deploykit bench` on it",
            )
        if not (has_module("cuda") or has_module("pycuda")):
            return Missing("neither cuda-python nor pycuda is installed", "pip install cuda-python")
        return self.missing()

    def versions(self) -> dict[str, str]:
        """The version of tensorrt-rtx, without importing it."""
        try:
            return {"tensorrt-rtx": metadata.version("tensorrt_rtx")}
        except metadata.PackageNotFoundError:
            return {}

    def precisions(self) -> tuple[str, ...]:
        """FP16 and INT8: FP32 is no reason to choose TensorRT."""
        return ("fp16", "int8")

    def targets(self) -> tuple[str, ...]:
        """The GPU that is here, where it can be built for; else a T4 and an L4 (or RTX 40)."""
        here = tuple(g.target for g in gpu.found()[:1] if g.target in plan_header.TARGETS)
        return here or ("sm75", "sm89")

    def all_targets(self) -> tuple[str, ...]:
        """Every GPU generation it can build for."""
        return plan_header.TARGETS

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """Why a precision cannot be had on a target, from what the builder does there (seen with 1.7.1)."""
        if target not in plan_header.TARGETS:
            return Missing(f"TensorRT-RTX builds no engine for '{target}'", f"choose from: {', '.join(plan_header.TARGETS)}")
        if precision not in _GRAPHS:
            return Missing(f"TensorRT-RTX has no {precision} path", f"choose from: {', '.join(_GRAPHS)}")
        if target == "sm75" and precision in ("int8", "mixed"):
            return Missing(plan.RTX_TURING_INT8, "use --fp16 for a T4, or --backend tensorrt on the T4 itself")
        if target == "sm75" and precision == "fp32":
            return Missing(plan.RTX_TURING_FP32, "use --fp16")
        return None

    def graph(self, precision: str) -> str:
        """The prepared graph: precision stands in it, since TensorRT-RTX has no precision flags."""
        if precision not in _GRAPHS:
            raise UnknownName("precision of tensorrt-rtx", precision, _GRAPHS)
        return _GRAPHS[precision]

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """An engine for `request.target`, written to `folder/model.engine`, its manifest unsaved. Builds in this process,
        unless a build has failed in it (see `builder.spoiled`).

        Where nodes that asked for INT8 run in something else, `facts` says so: 'fallback' node by node, 'fell_back' in
        words (None where nothing did); whether that is a failure is the caller's to say.
        options: 'profile_each_batch' (False), 'verify_rebuild' (True: build once more in a new process, where that takes
        seconds), 'workspace_bytes' (a limit on scratch memory).
        Raises InputError, ModelError, BackendFailed, MissingBackend.
        """
        absent = self.missing()
        if absent:
            raise MissingBackend(absent.why, absent.remedy)
        if request.target not in plan_header.TARGETS:
            raise UnknownName("TensorRT-RTX target", request.target, plan_header.TARGETS)
        if request.precision == "fp32" and request.target == "sm75":
            raise BackendFailed(plan.RTX_TURING_FP32, "use --fp16")
        import tensorrt_rtx as trt

        if builder.spoiled(trt):
            return children.run("TensorRT-RTX, new process", build_anew, artifact, request, folder)
        options = request.options
        wanted = profiles.for_batches(
            artifact.signature, request.batches, request.shapes, each=bool(options.get("profile_each_batch", False))
        )
        model = parser_graph.load(artifact.path)
        limit = int(options["workspace_bytes"]) if options.get("workspace_bytes") else None
        spec = builder.PlanSpec(profiles=wanted, target=request.target, workspace_bytes=limit)
        if request.precision == "int8":
            account.require_quantized(model)
        with _Second(artifact, spec, options) as second:
            made = builder.build(trt, model, artifact.path, artifact.signature, spec)
            again = second.verdict(made)
        told = account.facts(
            model,
            made,
            wanted,
            explained=[plan.RTX_TURING_INT8] if request.target == "sm75" else (),
            notes=_notes(request, again),
        )
        engine = folder / ENGINE_NAME
        write_atomically(engine, made.data)
        header = plan_header.read(engine)
        if header.targets != (request.target,):
            raise BackendFailed(f"asked for a plan for {request.target}, its header says {', '.join(header.targets)}")
        return Artifact(
            path=engine,
            format=self.name,
            precision=request.precision,
            signature=artifact.signature,
            stage="build",
            parent=artifact.sha256 or None,
            options={"target": request.target, "batches": list(request.batches), **options},
            versions=self.versions(),
            device=request.target,
            facts={**told, "target": request.target, "rebuild": again},
        )

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """A session on the GPU that is here. A foreign, cut or mismatched plan is named before a GPU is asked for.

        Raises InputError for such a file, MissingBackend without a GPU of the plan's generation.
        """
        header = plan_header.read(engine.path)
        absent = self.cannot_run()
        if absent:
            raise MissingBackend(
                f"{engine.path.name} (TensorRT-RTX, {', '.join(header.targets)}) cannot run here: {absent.why}", absent.remedy
            )
        here = gpu.found()[0]
        if here.target not in header.targets:
            raise MissingBackend(
                f"{engine.path.name} was built for {', '.join(header.targets)}; this machine has {here.name} ({here.target})",
                f"build it for this GPU: `deploykit build-trt MODEL.onnx --target {here.target}`",
            )
        import tensorrt_rtx as trt

        from deploykit.trt.device import open_device
        from deploykit.trt.runner import EngineSession

        adapter = request.options.get("cuda")
        gpu_open = open_device(None if adapter is None else str(adapter))
        request = replace(request, options={**_kept_kernels(engine, here), **request.options})
        return EngineSession(trt, gpu_open, engine, request, f"{here.name} ({here.target})")


def _kept_kernels(engine: Artifact, here: gpu.Gpu) -> dict[str, Json]:
    """Where the kernels that TensorRT-RTX compiles for this GPU are kept from one process to the next: each launch of a
    measurement would compile them anew. None where the user's cache folder cannot be written."""
    folder = cache_folder.made("tensorrt-rtx") if engine.sha256 else None
    if folder is None:
        return {}
    mark = hashlib.sha256(f"{engine.sha256} {here.name}".encode()).hexdigest()[:32]
    return {"runtime_cache": str(folder / f"{mark}.kernels")}


def _notes(request: BuildRequest, rebuild: str) -> list[str]:
    """What a reader should know of a plan beside its layers."""
    notes = [plan.RTX_INT8_POINTWISE] if request.precision in ("int8", "mixed") and request.target != "sm75" else []
    return [*notes, *([f"rebuild {rebuild}"] if rebuild.startswith("differs") else []), plan.UNVALIDATED]


class _Second:
    """A second build, in a process of its own and at the same time as the first: whether it makes the same bytes.

    Seen with 1.7.1: a static graph gives the same bytes in every new process; with dynamic shapes a handful of builds
    share a few outcomes that differ in numbers inside internal names (see `alike`). Within one process those names count up, so the bytes are
    comparable only where the first build was its process's first.
    """

    def __init__(self, artifact: Artifact, spec: builder.PlanSpec, options: Mapping[str, Json]) -> None:
        self._child: children.Child | None = None
        self._why = ""
        if not options.get("verify_rebuild", True):
            self._why = "not checked: not asked for"
        elif builder.has_built():
            self._why = "not checked: this process had built before, and layer names count up within a process"
        elif artifact.size_bytes > _VERIFY_UP_TO_BYTES:
            self._why = f"not checked: two builds of a graph of {artifact.size_bytes / 1e6:.0f} MB at once take much memory"
        else:
            self._child = children.Child("TensorRT-RTX, second build")
            self._child.start(plan_digest, artifact.path, artifact.signature, spec)

    def __enter__(self) -> _Second:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        if self._child is not None:
            self._child.kill()  # where the first build failed, nobody waits for it
            self._child.close()

    def verdict(self, made: builder.Plan) -> str:
        """'identical', 'differs: ...' or 'not checked: ...'."""
        if self._child is None:
            return self._why
        if made.build_s > _VERIFY_UP_TO_S:
            return f"not checked: one build takes {made.build_s:.0f} s"
        try:
            sha256, table = self._child.finish(timeout_s=_VERIFY_UP_TO_S)
        except BackendFailed as exc:
            return f"not checked: the second build failed ({exc.message})"
        if sha256 == hashlib.sha256(made.data).hexdigest():
            return "identical"
        if table != layers.by_kind(made.layers):
            return f"differs: the second plan runs other layers: {table}"
        return f"differs: {alike.difference(made.data, self._child.call(second_plan))}"


_second = b""  # in the process of a second build: the plan


def plan_digest(path: Path, signature: Signature, spec: builder.PlanSpec) -> tuple[str, dict[str, dict[str, int]]]:
    """sha256 and layers by kind of the plan for a graph; called in a process of its own, which keeps the plan."""
    global _second
    import tensorrt_rtx as trt

    made = builder.build(trt, parser_graph.load(path), path, signature, spec)
    _second = made.data
    return hashlib.sha256(made.data).hexdigest(), layers.by_kind(made.layers)


def second_plan() -> bytes:
    """The plan that `plan_digest` has built in this process."""
    return _second


def build_anew(artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
    """`build`, called in a process that has built nothing yet."""
    return BACKEND.build(artifact, request, folder)


BACKEND = TensorRtRtx()
