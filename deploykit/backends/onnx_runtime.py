"""ONNX Runtime on the CPU: the engine is the .onnx file itself, with its precision written into the graph."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import graph, machine
from deploykit.artifact import Artifact
from deploykit.backends import installed, opened
from deploykit.errors import BackendFailed, ModelError
from deploykit.session import BuildRequest, Missing, OpenRequest, Session
from deploykit.signature import Feeds, Outputs, Signature

if TYPE_CHECKING:
    import onnx

NAME = "onnxruntime"
_PROVIDERS = ["CPUExecutionProvider"]
_GRAPHS = {"fp32": "fp32", "fp16": "fp16", "int8": "int8-cpu", "int8-dynamic": "int8-dynamic", "mixed": "mixed"}
INTEGER_OPS = {
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention",
}  # fmt: skip
FLOAT_OPS = {
    "Conv",
    "FusedConv",
    "NhwcFusedConv",
    "ConvTranspose",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "LSTM",
    "GRU",
    "RNN",
}


class OnnxRuntime:
    """The backend 'onnxruntime'."""

    name = NAME
    extra = "cpu"

    def missing(self) -> Missing | None:
        """Why ONNX Runtime is not here; None when it is."""
        return installed.missing("onnxruntime", self.extra)

    def cannot_run(self) -> Missing | None:
        """The same as `missing`: what it builds runs on any CPU."""
        return self.missing()

    def versions(self) -> dict[str, str]:
        """The installed ONNX Runtime, under the name of its distribution."""
        return installed.versions("onnxruntime", "onnxruntime-gpu")

    def precisions(self) -> tuple[str, ...]:
        """fp32, static and dynamic INT8; fp16 and mixed when asked for."""
        return ("fp32", "int8", "int8-dynamic")

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """bf16, which its CPU kernels do not have, and any target but 'cpu'."""
        if precision not in _GRAPHS:
            return Missing(f"ONNX Runtime's CPU kernels have no {precision}", f"use --backend openvino for {precision}")
        return installed.only_cpu("ONNX Runtime", target)

    def targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def all_targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def graph(self, precision: str) -> str:
        """The graph for a precision; INT8 in the CPU's layout.

        Its kernels take uint8 activations with int8 weights; of a ResNet-18 in TensorRT's layout (int8 activations,
        float residual adds) 11 of 20 convolutions stay in float and its requantization steps stay separate nodes.
        """
        return _GRAPHS[precision]

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """The model as one .onnx in `folder`, external data inlined, after a session has opened on it.

        `facts['kernels']` counts the nodes of the graph that ONNX Runtime made of it, by operator.
        """
        model = graph.load(artifact.path)
        path = folder / "model.onnx"
        companions = graph.save(model, path)
        del model
        return Artifact(
            path=path,
            format="onnx",
            precision=request.precision,
            signature=artifact.signature,
            stage=f"build-{NAME}",
            parent=artifact.sha256 or None,
            options={"precision": request.precision},
            versions=self.versions(),
            facts={"kernels": kernels(path)},
            companions=dict.fromkeys(companions, ""),
        )

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """A session at one batch. `options['literal_qdq']` runs every Q/DQ pair as written, in float (accuracy only)."""
        opened.require_batch(engine.signature, request)
        literal = bool(request.options.get("literal_qdq"))
        entries = {"session.disable_quant_qdq": "1"} if literal else {}
        sizes = {engine.signature.batch_symbol: request.batch} if engine.signature.batch_symbol else {}
        session = create(engine.path, request.threads, entries, sizes)
        _require_names(session, engine)
        notes: tuple[str, ...]
        if literal:
            precision, notes = "fp32", ("Q/DQ pairs run as written, in float",)
        else:
            counts = engine.facts.get("kernels") or (kernels(engine.path) if request.precision != "fp32" else {})
            precision, notes = _really(request.precision, counts)
        return OnnxRuntimeSession(session, engine.signature, precision, request, notes)


class OnnxRuntimeSession:
    """An open InferenceSession on the CPU."""

    def __init__(self, session: Any, signature: Signature, precision: str, request: OpenRequest, notes: tuple[str, ...]) -> None:
        self._session: Any | None = session
        self._request = request
        self.signature = signature
        self.precision = precision
        self.device = "cpu"
        self.threads = int(session.get_session_options().intra_op_num_threads)
        self.notes = notes
        self._names = [spec.name for spec in signature.outputs]

    def infer(self, feeds: Feeds) -> Outputs:
        """Outputs by name. Raises InputError for feeds that do not fit, BackendFailed when the engine fails."""
        arrays = opened.ready(self.signature, self._request, feeds)
        try:
            return dict(zip(self._names, self._open().run(self._names, arrays), strict=True))
        except Exception as exc:
            raise _failed(exc) from exc

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """One run on inputs and outputs bound beforehand.

        I/O binding saves 3 us of 46 a run against `run` (a model of two convolutions; nothing to be seen on ResNet-18).
        Outputs whose shape depends on more than the batch cannot be bound ahead; they go through `run`.
        """
        import onnxruntime as ort

        arrays = opened.ready(self.signature, self._request, feeds)
        session = self._open()
        shapes = [s.shape for s in self.signature.outputs]
        if any(isinstance(d, str) and d != self.signature.batch_symbol for shape in shapes for d in shape):

            def run() -> object:
                try:
                    return session.run(self._names, arrays)
                except Exception as exc:
                    raise _failed(exc) from exc

            return run
        binding = session.io_binding()
        results = [np.array(array) for array in self.infer(feeds).values()]
        kept = [(name, ort.OrtValue.ortvalue_from_numpy(array)) for name, array in arrays.items()]
        for name, value in kept:
            binding.bind_ortvalue_input(name, value)
        kept_out = [(name, ort.OrtValue.ortvalue_from_numpy(array)) for name, array in zip(self._names, results, strict=True)]
        for name, value in kept_out:
            binding.bind_ortvalue_output(name, value)

        def run_bound() -> object:
            try:
                session.run_with_iobinding(binding)
            except Exception as exc:
                raise _failed(exc) from exc
            return kept, kept_out, results  # an OrtValue only borrows its array's memory: all of it lives as long as this call

        return run_bound

    def close(self) -> None:
        """Frees the engine; a second time does nothing."""
        self._session = None

    def _open(self) -> Any:
        if self._session is None:
            raise BackendFailed("this ONNX Runtime session is closed", "open the engine again")
        return self._session


def kernels(path: Path) -> dict[str, int]:
    """How many nodes of each operator ONNX Runtime's optimized graph of that file has, sub-graphs included.

    'fp16-weights' counts the matrix layers whose weights are still FLOAT16 there: on a CPU without FP16 kernels it puts
    casts around them and there are none. Raises ModelError or BackendFailed when no session opens.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="deploykit-") as name:
        out = Path(name) / "optimized.onnx"
        entries = {
            "session.optimized_model_external_initializers_file_name": "weights.bin",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }
        create(path, 1, entries, {}, optimized=out)
        model = onnx.load(str(out), load_external_data=False)
    counts: Counter[str] = Counter()
    halves = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    for node in _nodes(model.graph):
        counts[node.op_type] += 1
        if node.op_type in FLOAT_OPS and len(node.input) > 1 and node.input[1] in halves:
            counts["fp16-weights"] += 1
    return dict(sorted(counts.items()))


def _nodes(root: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    for node in root.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                yield from _nodes(inner)


def _really(asked: str, counts: dict[str, int]) -> tuple[str, tuple[str, ...]]:
    """The precision that runs, and what a reader of the row should know of it."""
    integer = sum(n for op, n in counts.items() if op in INTEGER_OPS)
    floating = sum(n for op, n in counts.items() if op in FLOAT_OPS)
    whole = integer + floating
    if asked == "fp16" and not counts.get("fp16-weights"):
        return "fp32", ("this CPU provider has no FP16 kernels: it casts to FP32 and computes there",)
    if asked not in ("int8", "int8-dynamic", "mixed"):
        return asked, ()
    if not integer:
        return "fp32", ("no convolution or matrix product became an integer kernel: they run in float",)
    notes = [
        f"{integer} of {whole} convolutions and matrix products run in integer kernels"
        + (", the rest in float" if floating else "")
    ]
    if counts.get("ConvInteger"):
        notes.append("dynamic convolutions (ConvInteger) are usually slower than FP32")
    if not {"avx512_vnni", "avx_vnni", "amx_int8"} & machine.features():
        notes.append("no VNNI on this CPU: uint8 x int8 sums saturate at 16 bits, results may differ")
    return asked, tuple(notes)


def create(
    path: Path,
    threads: int,
    entries: dict[str, str],
    sizes: dict[str, int],
    optimized: Path | None = None,
    profile_prefix: str | None = None,
) -> Any:
    """An InferenceSession on the CPU provider, and on nothing else; `optimized`: where to write the graph made of the file;
    `profile_prefix`: how the profile's file name begins, where one is wanted.

    `force_spinning_stop`: by default the idle pool spins for 34 ms of CPU after a run, which would be taken from whoever
    is measured next; stopping it at the end of each run costs nothing measurable (46.0 against 46.7 us a run on a tiny
    model), whereas `allow_spinning=0` costs 20 us a run (ONNX Runtime 1.31, 2 threads).
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    for key, value in {"session.force_spinning_stop": "1", **entries}.items():
        options.add_session_config_entry(key, value)
    for symbol, size in sizes.items():
        options.add_free_dimension_override_by_name(symbol, size)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    try:
        session = ort.InferenceSession(str(path), options, providers=_PROVIDERS)
    except Exception as exc:
        kind = type(exc).__name__
        if kind in ("InvalidProtobuf", "NoSuchFile", "InvalidGraph"):
            raise ModelError(
                f"ONNX Runtime cannot read {path.name}: {opened.first_line(exc)}", "export or build it again"
            ) from exc
        raise BackendFailed(
            f"ONNX Runtime {ort.__version__} cannot open {path.name}: {opened.first_line(exc)}",
            "see `deploykit check`; another opset or ONNX Runtime version may have the operator",
        ) from exc
    if session.get_providers() != _PROVIDERS:
        raise BackendFailed(f"ONNX Runtime opened {path.name} on {session.get_providers()} instead of {_PROVIDERS}")
    return session


def _require_names(session: Any, engine: Artifact) -> None:
    found = ({v.name for v in session.get_inputs()}, {v.name for v in session.get_outputs()})
    said = ({s.name for s in engine.signature.inputs}, {s.name for s in engine.signature.outputs})
    if found[0] != said[0] or not said[1] <= found[1]:
        raise ModelError(
            f"{engine.path.name} takes {sorted(found[0])} and gives {sorted(found[1])}, its manifest says {sorted(said[0])} "
            f"and {sorted(said[1])}",
            "build the engine again",
        )


def _failed(exc: Exception) -> BackendFailed:
    return BackendFailed(f"ONNX Runtime failed while running: {opened.first_line(exc)}", "check the inputs' values and shapes")


BACKEND = OnnxRuntime()
