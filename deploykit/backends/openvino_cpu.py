"""OpenVINO on the CPU: FP32, BF16 and INT8, each under the name of what really runs."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import graph, machine
from deploykit.artifact import Artifact
from deploykit.backends import installed, opened
from deploykit.errors import BackendFailed, ModelError
from deploykit.session import BuildRequest, Missing, OpenRequest, Session
from deploykit.signature import Feeds, Outputs, ShapeRange, Signature

NAME = "openvino"
_GRAPHS = {"fp32": "fp32", "bf16": "fp32", "int8": "int8-cpu", "mixed": "mixed"}
MATRIX_LAYERS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNSeq", "RNNCell"}
_EXECUTED = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}


class OpenVino:
    """The backend 'openvino'."""

    name = NAME
    extra = "openvino"
    concurrent = True

    def missing(self) -> Missing | None:
        """Why OpenVINO is not here; None when it is."""
        return installed.missing("openvino", self.extra)

    def cannot_run(self) -> Missing | None:
        """The same as `missing`: what it builds runs on any CPU."""
        return self.missing()

    def versions(self) -> dict[str, str]:
        """The installed OpenVINO."""
        return installed.versions("openvino")

    def precisions(self) -> tuple[str, ...]:
        """fp32, int8, and bf16 where the CPU computes in it."""
        return ("fp32", "bf16", "int8") if _has_bf16() else ("fp32", "int8")

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """bf16 on a CPU without it, the precisions OpenVINO's CPU plugin has no kernels for, any target but 'cpu'."""
        if precision == "bf16" and not _has_bf16():
            return Missing("this CPU has neither AVX-512 BF16 nor AMX", "use fp32 or int8, or a newer CPU")
        if precision == "fp16":
            return Missing("OpenVINO computes FP16 graphs in FP32 or BF16 on x86", "use bf16, or fp16 on a GPU backend")
        if precision not in _GRAPHS:
            return Missing(
                f"OpenVINO has no {precision} for convolutions", f"use --backend onnxruntime for {precision}, or int8 here"
            )
        return installed.only_cpu("OpenVINO", target)

    def targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def all_targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def graph(self, precision: str) -> str:
        """The graph for a precision. Both INT8 layouts run all of ResNet-18's layers in integers; the CPU's layout took
        4.84 ms, TensorRT's 5.49 ms (batch 1, 2 cores of Zen 4, OpenVINO 2026.4): the residual additions stay in uint8."""
        return _GRAPHS[precision]

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """IR (.xml and .bin, weights as precise as in the graph) in `folder`, after it has compiled once here."""
        import openvino as ov

        if artifact.path.suffix == ".onnx":
            graph.load(artifact.path)  # refuses truncated files and external data outside the folder, with the reason
        model = read(artifact.path)
        path = folder / "model.xml"
        try:
            ov.save_model(model, str(path), compress_to_fp16=False)
        except RuntimeError as exc:
            raise BackendFailed(f"OpenVINO cannot write its IR of {artifact.path.name}: {opened.first_line(exc)}") from exc
        batch = artifact.signature.fixed_batch or request.batches[0]
        compile_model(path, artifact.signature, OpenRequest(request.precision, batch, 1, request.shapes))
        return Artifact(
            path=path,
            format=NAME,
            precision=request.precision,
            signature=artifact.signature,
            stage=f"build-{NAME}",
            parent=artifact.sha256 or None,
            options={"precision": request.precision},
            versions=self.versions(),
            companions={"model.bin": ""},
        )

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """A session on IR or .onnx, reshaped to the static batch."""
        opened.require_batch(engine.signature, request)
        compiled = compile_model(engine.path, engine.signature, request)
        return OpenVinoSession(compiled, engine.signature, request)


class OpenVinoSession:
    """A compiled model on the CPU: latency hint and one stream, or with `options['streams']` as many requests at once."""

    def __init__(self, compiled: Any, signature: Signature, request: OpenRequest) -> None:
        self._compiled: Any | None = compiled
        self._opened_at = request
        self.signature = signature
        self.device = "cpu"
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        self.streams = int(compiled.get_property("NUM_STREAMS"))
        self.precision, self.notes = _really(request.precision, executed(compiled))
        if self.streams > 1:
            self.notes = (*self.notes, f"{self.streams} requests at once, on {self.threads} threads in all")
        self._inputs = [port(compiled.inputs, spec.name, "input") for spec in signature.inputs]
        self._outputs = [port(compiled.outputs, spec.name, "output") for spec in signature.outputs]
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.streams):
            self._idle.put(compiled.create_infer_request())

    def infer(self, feeds: Feeds) -> Outputs:
        """Outputs by name, copied out of the engine. Raises InputError for feeds that do not fit, BackendFailed."""
        self._compiled_or_raise()
        request = self._idle.get()
        try:
            self._run(self._bound(request, feeds))
            return {
                spec.name: np.array(request.get_output_tensor(index).data)
                for spec, index in zip(self.signature.outputs, self._outputs, strict=True)
            }
        finally:
            self._idle.put(request)

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """One run of an infer request of its own, its inputs bound beforehand; outputs stay where the engine wrote them.

        Setting the input tensor in every run costs 2.4 us more, start_async and wait 9 us (of 44 us, a tiny model).
        """
        request = self._bound(self._compiled_or_raise().create_infer_request(), feeds)

        def run() -> object:
            try:
                return request.infer(share_outputs=True)
            except RuntimeError as exc:
                raise _failed(exc) from exc

        return run

    def close(self) -> None:
        """Frees the engine; a second time does nothing."""
        self._idle = queue.SimpleQueue()
        self._compiled = None

    def _compiled_or_raise(self) -> Any:
        if self._compiled is None:
            raise BackendFailed("this OpenVINO session is closed", "open the engine again")
        return self._compiled

    def _bound(self, request: Any, feeds: Feeds) -> Any:
        import openvino as ov

        self._compiled_or_raise()
        arrays = opened.ready(self.signature, self._opened_at, feeds, static=True)
        try:
            for index, array in zip(self._inputs, arrays.values(), strict=True):
                request.set_input_tensor(index, ov.Tensor(array))
        except RuntimeError as exc:
            raise _failed(exc) from exc
        return request

    @staticmethod
    def _run(request: Any) -> None:
        try:
            request.infer(share_outputs=True)
        except RuntimeError as exc:
            raise _failed(exc) from exc


def executed(compiled: Any) -> dict[str, int]:
    """How many convolutions and matrix products of a compiled model run in each precision ('u8', 'f32', 'bf16', ...)."""
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in MATRIX_LAYERS:
            counts[info["runtimePrecision"].astype(str)] += 1
    return dict(counts)


def _really(asked: str, counts: Mapping[str, int]) -> tuple[str, tuple[str, ...]]:
    """The precision of most convolutions and matrix products (of as many: the one asked for), and a note on the others."""
    named: Counter[str] = Counter()
    for kind, n in counts.items():
        named[_EXECUTED.get(kind, kind)] += n
    if not named:
        return ("fp32" if asked in ("int8", "mixed") else asked), ("no convolution or matrix product in this graph",)
    most = max(named, key=lambda kind: (named[kind], kind == asked))
    shares = ", ".join(f"{n} in {kind}" for kind, n in named.most_common())
    if asked == "mixed" and len(named) > 1:
        return "mixed", (f"convolutions and matrix products: {shares}",)
    return most, (() if set(named) == {asked} else (f"convolutions and matrix products: {shares}",))


def _has_bf16() -> bool:
    return bool({"avx512_bf16", "amx_bf16"} & machine.features())


def read(path: Path) -> Any:
    import openvino as ov

    try:
        return ov.Core().read_model(str(path))
    except RuntimeError as exc:
        raise ModelError(
            f"OpenVINO cannot read {path.name}: {opened.first_line(exc)}",
            "check the file with `deploykit check`, or build it again",
        ) from exc


def compile_model(path: Path, signature: Signature, request: OpenRequest, more: Mapping[str, Any] | None = None) -> Any:
    """The model compiled for the CPU at static shapes; `more`: OpenVINO properties beside those set here.

    The precision hint is always set: unset, OpenVINO runs FP32 graphs in BF16 on CPUs with AMX. With INT8 graphs it rules
    the float layers between the integer ones: FP32 keeps them comparable with other engines' INT8 rows, and on ResNet-18
    BF16 gained nothing beyond noise (4.84 against 4.64 ms, spreads 4.4 to 5.3). No model cache: it would hide load time.
    """
    import openvino as ov

    model = read(path)
    _reshape(model, signature, request.batch, request.shapes)
    streams = int(request.options.get("streams", 1))
    config = {
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": request.threads,
        "INFERENCE_PRECISION_HINT": "bf16" if request.precision == "bf16" else "f32",
    }
    try:
        return ov.Core().compile_model(model, "CPU", {**config, **(more or {})})
    except RuntimeError as exc:
        raise BackendFailed(
            f"OpenVINO cannot compile {path.name} at batch {request.batch}: {opened.first_line(exc)}",
            "the graph may need another batch or an operator OpenVINO lacks; try --backend onnxruntime",
        ) from exc


def _reshape(model: Any, signature: Signature, batch: int, ranges: Mapping[str, ShapeRange]) -> None:
    shapes = signature.shapes(batch, ranges)
    try:
        model.reshape({port(model.inputs, name, "input"): list(shape) for name, shape in shapes.items()})
    except RuntimeError as exc:
        raise BackendFailed(
            f"OpenVINO cannot run the graph at batch {batch}, input shapes {shapes}: {opened.first_line(exc)}",
            "the graph has sizes baked in; see `deploykit check`",
        ) from exc


def port(ports: list[Any], name: str, kind: str) -> int:
    """The index of the input or output called `name`. Raises ModelError when the file has none of that name."""
    for index, port in enumerate(ports):
        if name in port.get_names():
            return index
    names = [sorted(port.get_names()) for port in ports]
    raise ModelError(f"the engine has no {kind} '{name}' that its manifest names; it has {names}", "build the engine again")


def _failed(exc: Exception) -> BackendFailed:
    return BackendFailed(f"OpenVINO failed while running: {opened.first_line(exc)}", "check the inputs' values and shapes")


BACKEND = OpenVino()
