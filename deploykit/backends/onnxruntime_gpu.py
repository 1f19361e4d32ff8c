"""ONNX Runtime on an NVIDIA GPU: one backend a provider (CUDA, TensorRT, TensorRT-RTX), the provider really in use checked.

ONNX Runtime falls back to the CPU with no more than a line in its log, so every session is asked what it runs on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import artifact as artifacts
from deploykit import cache_folder, graph
from deploykit.artifact import Artifact
from deploykit.backends import installed, opened
from deploykit.children import has_module
from deploykit.errors import BackendFailed, MissingBackend, ModelError
from deploykit.session import BuildRequest, Missing, OpenRequest, Session
from deploykit.signature import Feeds, Outputs, Signature
from deploykit.trt import gpu, plan

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "LSTM", "GRU", "RNN", "Attention")


@dataclass(frozen=True)
class Provider:
    """One execution provider: its name in ONNX Runtime, the graph it takes for each precision, which of them are offered by
    default, why not the others, and the oldest GPU generation.

    `behind`: providers that take what it leaves; `plugin`: the package that brings it, where it is not in onnxruntime-gpu;
    `options`: its own options for a precision; `places`: the option that names a folder for what it builds.
    """

    row: str
    title: str
    name: str
    graphs: Mapping[str, str]
    offered: tuple[str, ...]
    refused: Mapping[str, Missing]
    oldest: str
    behind: tuple[str, ...] = ()
    plugin: str | None = None
    options: Callable[[str], dict[str, str]] = lambda _: {}
    places: str | None = None


class OnnxRuntimeGpu:
    """The backend of one provider."""

    extra = "gpu"

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.name = provider.row
        if provider.plugin:
            self.extra = "gpu-rtx"

    def missing(self) -> Missing | None:
        """Why it cannot run here: the wheel, then the GPU."""
        here = installed.version("onnxruntime-gpu")
        if self.provider.plugin:
            if not has_module("onnxruntime") or not has_module(self.provider.plugin):
                return Missing(f"the package '{self.provider.plugin}' is not installed", f"pip install 'deploykit[{self.extra}]'")
        elif here is None and has_module("onnxruntime"):
            return Missing(
                "the onnxruntime that is installed is the CPU's; both wheels hold the same module",
                f"pip uninstall onnxruntime, then pip install 'deploykit[{self.extra}]'",
            )
        elif here is None:
            return Missing("the package 'onnxruntime-gpu' is not installed", f"pip install 'deploykit[{self.extra}]'")
        if not gpu.found():
            return Missing("no NVIDIA GPU with a CUDA driver was found here", "run it on a machine with one")
        return None

    def cannot_run(self) -> Missing | None:
        """The same as `missing`: a session is opened while it builds."""
        return self.missing()

    def versions(self) -> dict[str, str]:
        """ONNX Runtime, the provider's own package and the GPU."""
        names = ("onnxruntime-gpu", "onnxruntime", *((self.provider.plugin,) if self.provider.plugin else ()))
        found = installed.versions(*names)
        here = gpu.found()
        return found | ({"gpu": f"{here[0].name} {here[0].target}"} if here else {})

    def precisions(self) -> tuple[str, ...]:
        """Those that are a reason to choose it."""
        return self.provider.offered

    def targets(self) -> tuple[str, ...]:
        """The GPU that is here; the oldest it takes where there is none, so that a row asked for says what it needs."""
        return tuple(g.target for g in gpu.found()[:1]) or (self.provider.oldest,)

    def all_targets(self) -> tuple[str, ...]:
        """Every GPU generation with a name."""
        return tuple(dict.fromkeys((*plan.GENERATIONS, *self.targets())))

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """A precision it has no kernels for, another GPU than the one here, or one too old."""
        if precision in self.provider.refused:
            return self.provider.refused[precision]
        if precision not in self.provider.graphs:
            return Missing(f"{self.provider.title} has no {precision} path", f"choose from: {', '.join(self.provider.graphs)}")
        here = gpu.found()
        if here and target != here[0].target:
            return Missing(
                f"it runs on the GPU that is here ({here[0].name}, {here[0].target}), not on {target}", "leave --target out"
            )
        generation = int(target.removeprefix("sm")) if target.startswith("sm") else 0
        if generation < int(self.provider.oldest.removeprefix("sm")):
            return Missing(
                f"{self.provider.title} starts at {self.provider.oldest}, and this is {target}", "use --backend onnxruntime-cuda"
            )
        return None

    def graph(self, precision: str) -> str:
        """The graph for a precision."""
        return self.provider.graphs[precision]

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """The model as one .onnx in `folder`, after a session has opened on it with the provider in use.

        Raises MissingBackend, ModelError, and BackendFailed where ONNX Runtime fell back.
        """
        absent = self.missing() or self.unsupported(request.precision, request.target)
        if absent:
            raise MissingBackend(absent.why, absent.remedy)
        path = folder / "model.onnx"
        companions = graph.save(graph.load(artifact.path), path)
        made = Artifact(
            path=path,
            format="onnx",
            precision=request.precision,
            signature=artifact.signature,
            stage=f"build-{self.name}",
            parent=artifact.sha256 or None,
            options={"precision": request.precision, "target": request.target},
            versions=self.versions(),
            device=request.target,
            companions=dict.fromkeys(companions, ""),
        )
        self.open(made, OpenRequest(request.precision, request.batches[0], 1, request.shapes)).close()
        return made

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """A session at one batch, on the provider. Raises MissingBackend without it, BackendFailed where ONNX Runtime
        opened the model on another one."""
        opened.require_batch(engine.signature, request)
        absent = self.missing()
        if absent:
            raise MissingBackend(absent.why, absent.remedy)
        sizes = {engine.signature.batch_symbol: request.batch} if engine.signature.batch_symbol else {}
        session = create(engine.path, self.provider, request.precision, request.threads, sizes, mark_of(engine))
        here = gpu.found()[0]
        notes = (*placed(session, self.provider), *plan.tf32(request.precision, here.target))
        return GpuSession(session, engine.signature, request, f"{here.name} ({here.target})", notes)


def mark_of(engine: Artifact) -> str:
    """The sha256 of the model's files, weights beside the graph included, taken here where the artifact has none yet."""
    told = [engine.sha256 or artifacts.sha256_of(engine.path)]
    told += [sha or artifacts.sha256_of(engine.path.parent / name) for name, sha in sorted(engine.companions.items())]
    return told[0] if len(told) == 1 else hashlib.sha256(" ".join(told).encode()).hexdigest()


def create(path: Path, provider: Provider, precision: str, threads: int, sizes: Mapping[str, int], mark: str = "") -> Any:
    """An InferenceSession on that provider. What the provider keeps lies in a folder of the model's `mark`, and is not kept
    without one: ONNX Runtime's own key knows no weights. Raises BackendFailed where it cannot be had or ONNX Runtime took
    another one instead, ModelError for a file that is no model."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for symbol, size in sizes.items():
        options.add_free_dimension_override_by_name(symbol, size)
    own = provider.options(precision)
    kept = cache_folder.made(f"{provider.row}-{ort.__version__}/{mark}") if provider.places and mark else None
    if provider.places and kept is not None:
        own[provider.places] = str(kept)
    elif "trt_engine_cache_enable" in own:
        own["trt_engine_cache_enable"] = "0"  # without a folder it would write into the working directory
    try:
        if provider.plugin:
            _register(ort, provider, options, own)
            session = ort.InferenceSession(str(path), options, enable_fallback=0)
        else:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # an unknown provider is a warning there; here it is the error below
                if hasattr(ort, "preload_dlls"):
                    ort.preload_dlls()  # CUDA and cuDNN from pip's own packages; prints what it does not find
                wanted: list[Any] = [(provider.name, own), *provider.behind]
                session = ort.InferenceSession(str(path), options, providers=wanted, enable_fallback=0)
    except BackendFailed:
        raise
    except Exception as exc:
        if type(exc).__name__ in ("InvalidProtobuf", "NoSuchFile", "InvalidGraph"):
            raise ModelError(
                f"ONNX Runtime cannot read {path.name}: {opened.first_line(exc)}", "export or build it again"
            ) from exc
        raise BackendFailed(f"{provider.title} cannot open {path.name}: {opened.first_line(exc)}", _REMEDY) from exc
    require_in_use(session.get_providers(), provider)
    return session


_REMEDY = (
    "its libraries must be found: CUDA and cuDNN (onnxruntime-gpu[cuda,cudnn]), for TensorRT libnvinfer too; "
    "`deploykit doctor` shows what is here"
)


def require_in_use(in_use: list[str], provider: Provider) -> None:
    """Raises BackendFailed unless the session's first provider is the one asked for."""
    if not in_use or in_use[0] != provider.name:
        raise BackendFailed(
            f"asked for {provider.name}, and ONNX Runtime silently fell back to {', '.join(in_use) or 'nothing'}", _REMEDY
        )


def _register(ort: Any, provider: Provider, options: Any, own: dict[str, str]) -> None:
    """Adds a plugin provider's devices. Raises BackendFailed where it lists none."""
    import importlib

    assert provider.plugin is not None
    package = importlib.import_module(provider.plugin)
    name = package.get_ep_name()
    if name not in {device.ep_name for device in ort.get_ep_devices()}:
        ort.register_execution_provider_library(name, package.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise BackendFailed(f"{provider.title} lists no GPU that it runs on", "it needs an NVIDIA GPU of Ampere or later")
    options.add_provider_for_devices(devices[:1], own)


def placed(session: Any, provider: Provider) -> tuple[str, ...]:
    """Notes on which provider took which nodes. Raises BackendFailed where the provider is loaded and none of the
    convolutions and matrix products is its own."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return ("this ONNX Runtime does not say which provider runs which node",)
    nodes: Counter[str] = Counter()
    heavy: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            nodes[part.ep_name] += 1
            heavy[part.ep_name] += node.op_type in HEAVY
    if heavy.total() and not heavy[provider.name]:
        where = ", ".join(f"{n} on {name}" for name, n in heavy.items() if n)
        raise BackendFailed(f"{provider.name} is loaded and runs none of the convolutions and matrix products: {where}", _REMEDY)
    elsewhere = {name: n for name, n in nodes.items() if name != provider.name}
    if not elsewhere:
        return (f"all {nodes.total()} nodes run on {provider.name}",)
    said = ", ".join(f"{n} on {name} ({heavy[name]} of them convolutions or matrix products)" for name, n in elsewhere.items())
    return (f"{nodes[provider.name]} of {nodes.total()} nodes run on {provider.name}, {said}",)


class GpuSession:
    """An open InferenceSession, host in and host out."""

    def __init__(self, session: Any, signature: Signature, request: OpenRequest, where: str, notes: tuple[str, ...]) -> None:
        self._session: Any | None = session
        self._request = request
        self.signature = signature
        self.precision = request.precision
        self.device = where
        self.threads = int(session.get_session_options().intra_op_num_threads)
        self.notes = notes
        self._names = [spec.name for spec in signature.outputs]

    def infer(self, feeds: Feeds) -> Outputs:
        """Outputs by name. Raises InputError for feeds that do not fit, BackendFailed when the provider fails."""
        return dict(zip(self._names, self._run(opened.ready(self.signature, self._request, feeds)), strict=True))

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """`run` on arrays that lie ready. I/O binding is left out: binding an input copies it to the GPU there and then, so
        the copy would be missing from the time."""
        arrays = opened.ready(self.signature, self._request, feeds)
        return lambda: self._run(arrays)

    def close(self) -> None:
        """Frees the session."""
        self._session = None

    def _run(self, arrays: Outputs) -> list[Any]:
        if self._session is None:
            raise BackendFailed("this ONNX Runtime session is closed", "open the engine again")
        try:
            found: list[Any] = self._session.run(self._names, arrays)
        except Exception as exc:
            raise BackendFailed(f"ONNX Runtime failed while running: {opened.first_line(exc)}", "try a smaller batch") from exc
        return found
