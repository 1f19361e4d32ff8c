"""TensorRT: engines built on the GPU they run on. TensorRT-RTX builds ahead of time; this does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, write_atomically
from deploykit.backends import installed
from deploykit.errors import BackendFailed, InputError, MissingBackend, UnknownName
from deploykit.session import BuildRequest, Missing, OpenRequest, Session
from deploykit.trt import account, builder, gpu, implicit, parser_graph, plan, plan_header, profiles

_GRAPHS = {"fp32": "fp32", "fp16": "fp16", "int8": "int8-tensorrt", "mixed": "int8-tensorrt"}
_NO_GPU = Missing(
    "TensorRT builds on the GPU the engine is for, and none with a CUDA driver was found here",
    "run it on a machine with an NVIDIA GPU (a T4 or newer), or build ahead of time with --backend rtx",
)
_REBUILD = (
    "not checked: TensorRT chooses kernels by timing them on the GPU, so two builds may differ; "
    "--timing-cache FILE keeps the timings, which makes them alike"
)
ENGINE_NAME = "model.engine"


class TensorRt:
    """The backend 'tensorrt' of `pip install 'deploykit[tensorrt]'`: TensorRT 8.6, 10 and 11, by what the module has."""

    name = "tensorrt"
    extra = "tensorrt"

    def missing(self) -> Missing | None:
        """Why no engine can be built here: the package, or the GPU that building needs."""
        return installed.missing("tensorrt", self.extra) or _only_stubs() or (None if gpu.found() else _NO_GPU)

    def cannot_run(self) -> Missing | None:
        """Why an engine cannot run here."""
        if not gpu.found():
            return Missing(
                "no NVIDIA GPU with a CUDA driver was found here",
                "copy the engine and its manifest to the machine with the GPU it was built on and run `deploykit bench` there",
            )
        if installed.missing("cuda", self.extra) and installed.missing("pycuda", self.extra):
            return Missing("neither cuda-python nor pycuda is installed", "pip install cuda-python")
        return self.missing()

    def versions(self) -> dict[str, str]:
        """TensorRT's version and the GPU: another GPU makes another engine."""
        version = installed.version("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-bindings")
        found = {"tensorrt": version} if version else {}
        here = gpu.found()
        return found | ({"gpu": f"{here[0].name} {here[0].target}"} if here else {})

    def precisions(self) -> tuple[str, ...]:
        """FP16 and INT8: FP32 is no reason to choose TensorRT."""
        return ("fp16", "int8")

    def targets(self) -> tuple[str, ...]:
        """The GPU that is here; a T4 where there is none, so that what it would take has its row."""
        return tuple(g.target for g in gpu.found()[:1]) or ("sm75",)

    def all_targets(self) -> tuple[str, ...]:
        """Every GPU generation it has a name for."""
        return tuple(dict.fromkeys((*plan.GENERATIONS, *self.targets())))

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """Why a precision cannot be had on a target: another GPU than the one here, or no path to it."""
        if precision not in _GRAPHS:
            return Missing(f"deploykit builds no {precision} engines with TensorRT", f"choose from: {', '.join(_GRAPHS)}")
        here = gpu.found()
        if here and target != here[0].target:
            return Missing(
                f"TensorRT builds for the GPU it runs on ({here[0].name}, {here[0].target}), not for {target}",
                f"run it on that machine, or build ahead of time: --backend rtx --target {target}",
            )
        return None

    def graph(self, precision: str) -> str:
        """The prepared graph: the same Q/DQ + FP16 graph as TensorRT-RTX takes."""
        if precision not in _GRAPHS:
            raise UnknownName("precision of tensorrt", precision, _GRAPHS)
        return _GRAPHS[precision]

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """An engine for the GPU that is here, written to `folder/model.engine`, its manifest unsaved.

        options: 'calibration' (path of our table or a text cache: implicit INT8 from a float graph, TensorRT up to 10),
        'timing_cache' (path, read and written), 'profile_each_batch' (False), 'workspace_bytes'.
        Raises InputError, ModelError, BackendFailed, MissingBackend.
        """
        absent = self.missing() or self.unsupported(request.precision, request.target)
        if absent:
            raise MissingBackend(absent.why, absent.remedy)
        import tensorrt as trt

        options = request.options
        wanted = profiles.for_batches(
            artifact.signature, request.batches, request.shapes, each=bool(options.get("profile_each_batch", False))
        )
        model = parser_graph.load(artifact.path)
        text, said = _calibration(trt, request, model, artifact.path)
        cache = Path(str(options["timing_cache"])) if options.get("timing_cache") else None
        spec = builder.PlanSpec(
            profiles=wanted,
            builder_flags=builder.precision_flags(trt, request.precision, calibrated=text is not None),
            calibration_cache=text,
            workspace_bytes=int(options["workspace_bytes"]) if options.get("workspace_bytes") else None,
            timing_cache=None if cache is None else cache.read_bytes() if cache.is_file() else b"",
        )
        made = builder.build(trt, model, artifact.path, artifact.signature, spec)
        if cache is not None and made.timing_cache is not None:
            write_atomically(cache, made.timing_cache)
        made = builder.with_layers(made, builder.inspect(trt, made.data, wanted[0] if wanted else None))
        told = account.facts(model, made, wanted, implicit=text is not None)
        for kind in ("warnings", "notes"):
            told[kind] = [*said, *told[kind]]
        told["notes"] += plan.tf32(request.precision, request.target)
        engine = folder / ENGINE_NAME
        write_atomically(engine, made.data)
        here = gpu.found()[0]
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
            facts={**told, "target": here.target, "gpu": here.name, "rebuild": _REBUILD},
        )

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """A session on the GPU that is here. Raises InputError for a file that is no plan, MissingBackend without the GPU."""
        _refuse_foreign(engine.path)
        absent = self.cannot_run()
        if absent:
            raise MissingBackend(f"{engine.path.name} (TensorRT, {engine.device}) cannot run here: {absent.why}", absent.remedy)
        here = gpu.found()[0]
        built_on = engine.facts.get("gpu", here.name)
        if built_on != here.name:
            raise MissingBackend(
                f"{engine.path.name} was built on {built_on}; this machine has {here.name}",
                "a TensorRT plan runs on the GPU model it was built on; build it again here",
            )
        import tensorrt as trt

        from deploykit.trt.device import open_device
        from deploykit.trt.runner import EngineSession

        adapter = request.options.get("cuda")
        device = open_device(None if adapter is None else str(adapter))
        return EngineSession(trt, device, engine, request, f"{here.name} ({here.target})")


def _only_stubs() -> Missing | None:
    """Seen with tensorrt-stubs 10.13: it installs a folder `tensorrt` of type stubs, which imports as an empty package."""
    found = importlib.util.find_spec("tensorrt")
    if found is not None and found.origin is None:
        return Missing("the package 'tensorrt' that is here holds no code (type stubs?)", "pip install 'deploykit[tensorrt]'")
    return None


def _calibration(trt: Any, request: BuildRequest, model: Any, path: Path) -> tuple[str | None, tuple[str, ...]]:
    """The cache's text for implicit INT8 of the model at `path`, and what to warn of; None for a graph that says its own precision."""
    named = request.options.get("calibration")
    if request.precision != "int8" or not named:
        if request.precision == "int8":
            account.require_quantized(model)
        return None, ()
    if not implicit.available(trt):
        raise InputError(
            f"TensorRT {trt.__version__} has no INT8 calibrators", "leave --int8-mode implicit out; it reads Q/DQ from the graph"
        )
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise BackendFailed(
            "a calibration cache was given for a graph with Q/DQ nodes", "give the float model to --int8-mode implicit"
        )
    text = implicit.cache_text(trt, Path(str(named)), path)
    return text, implicit.check_names(text, model)


def _refuse_foreign(path: Path) -> None:
    """Raises InputError for a file that is surely no plan of TensorRT; what else is wrong, its runtime says."""
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError as exc:
        raise InputError(f"cannot read the engine {path}: {exc.strerror}", "check the path") from exc
    if start == plan_header.MAGIC or len(start) < 4:
        what = "a plan of TensorRT-RTX" if start else "empty"
        raise InputError(f"{path.name} is no TensorRT plan: it is {what}", "build it again with `deploykit build-trt`")


BACKEND = TensorRt()
