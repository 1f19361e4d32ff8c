"""LiteRT (the successor of TensorFlow Lite): .tflite from the PyTorch source, in FP32, FP16 weights, dynamic and static INT8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Artifact
from deploykit.backends import installed, litert_convert, litert_flatbuffer, litert_quantize, opened, torch_source
from deploykit.errors import BackendFailed, InputError, ModelError, UnknownName
from deploykit.session import BuildRequest, Missing, OpenRequest, Session
from deploykit.signature import Feeds, Outputs, Signature

NAME = "litert"
_PRECISIONS = ("fp32", "fp16", "int8-dynamic", "int8")
_CONVERTER = "litert-torch"


class LiteRt:
    """The backend 'litert'."""

    name = NAME
    extra = "litert"
    from_fp32 = ("fp16", "int8-dynamic", "int8")

    def missing(self) -> Missing | None:
        """Why LiteRT or its converter is not here; None when both are."""
        for module in ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"):
            absent = installed.missing(module, self.extra)
            if absent is not None:
                return absent
        return None

    def cannot_run(self) -> Missing | None:
        """No LiteRT runtime: what it builds runs on any CPU, and needs no converter any more."""
        return installed.missing("ai_edge_litert", self.extra)

    def versions(self) -> dict[str, str]:
        """The installed converter, quantizer and runtime, and torch, which traces the model."""
        return installed.versions("ai-edge-litert", "ai-edge-quantizer", _CONVERTER, "litert-converter", "torch")

    def precisions(self) -> tuple[str, ...]:
        """fp32 and both kinds of INT8. fp16 when asked for: it halves the file, and a CPU computes it in FP32."""
        return ("fp32", "int8-dynamic", "int8")

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """bf16 and mixed, which LiteRT has no form of, and any target but 'cpu'."""
        if precision not in _PRECISIONS:
            return Missing(f"LiteRT files have no {precision}", "use int8 or int8-dynamic, or --backend openvino")
        return installed.only_cpu("LiteRT", target)

    def targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def all_targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def graph(self, precision: str) -> str:
        """The PyTorch source; for static INT8 with calibration samples."""
        return "source-calibrated" if precision == "int8" else "source"

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """model.tflite in `folder`; one file for each batch where the graph cannot be resized to another. `artifact`: a PyTorch
        source, which is converted, or an FP32 engine of this backend.

        `request.options`: 'io' is 'float' (default) or 'int8', what a static INT8 file takes and gives.
        Raises BackendFailed, ModelError, NotForThisGraph.
        """
        io = _io(request)
        with litert_convert.quiet():
            floats = _floats(artifact) if artifact.format == NAME else _converted(artifact, request)
            made = {batch: _in_precision(data, batch, request, io) for batch, data in floats.items()}
        names = {batch: _file(batch, first=position == 0) for position, batch in enumerate(made)}
        for batch, data in made.items():
            (folder / names[batch]).write_bytes(data)
        first = litert_flatbuffer.parse(next(iter(made.values())), "the new model")
        for batch in made:
            LiteRtSession(
                folder / names[batch],
                artifact.signature,
                OpenRequest(request.precision, batch or min(request.batches), 1, request.shapes),
            ).close()
        return Artifact(
            path=folder / next(iter(names.values())),
            format=NAME,
            precision=request.precision,
            signature=artifact.signature,
            stage=f"build-{NAME}",
            parent=artifact.sha256 or None,
            options={"precision": request.precision, "io": io},
            versions=self.versions(),
            facts={
                "files": {str(batch): name for batch, name in names.items()},
                "layers": litert_flatbuffer.layers(first),
                **litert_flatbuffer.ports(first),
                **({"notes": artifact.facts["notes"]} if artifact.facts.get("notes") else {}),
            },
            companions=dict.fromkeys(list(names.values())[1:], ""),
        )

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """The interpreter with XNNPACK on `request.threads` threads, resized to the batch. Raises InputError for a batch that
        the files were not made for, ModelError for a file that is no .tflite, BackendFailed."""
        opened.require_batch(engine.signature, request)
        return LiteRtSession(_path(engine, request.batch), engine.signature, request)


def _converted(artifact: Artifact, request: BuildRequest) -> dict[int, bytes]:
    return litert_convert.convert(torch_source.load(artifact), artifact.signature, request)


def _floats(engine: Artifact) -> dict[int, bytes]:
    """The files of an FP32 engine by batch, as `litert_convert.convert` gave them."""
    assert engine.precision == "fp32", engine
    return {int(batch): (engine.path.parent / name).read_bytes() for batch, name in engine.facts["files"].items()}


def _io(request: BuildRequest) -> str:
    io = str(request.options.get("io", "float"))
    if io not in litert_quantize.IO:
        raise UnknownName("kind of inputs and outputs", io, litert_quantize.IO)
    if io != "float" and request.precision != "int8":
        raise InputError(f"{request.precision} files have float inputs and outputs", "io 'int8' goes with static int8")
    return io


def _in_precision(data: bytes, batch: int, request: BuildRequest, io: str) -> bytes:
    if request.precision == "fp16":
        return litert_quantize.to_fp16(data)
    if request.precision == "int8-dynamic":
        return litert_quantize.to_dynamic(data)
    if request.precision == "int8":
        if request.calibration is None or not len(request.calibration):
            raise InputError("static int8 needs samples to calibrate with, and there are none", "add --data DATA")
        return litert_quantize.to_static(data, request.calibration, batch or 1, io)
    return data


def _file(batch: int, *, first: bool) -> str:
    return "model.tflite" if first else f"model-batch{batch}.tflite"


def _path(engine: Artifact, batch: int) -> Path:
    """The file for `batch`. Raises InputError naming the batches there are."""
    files: Mapping[str, str] = engine.facts.get("files", {})
    for key in (str(litert_convert.ANY_BATCH), str(batch)):
        if key in files:
            return engine.path.parent / files[key]
    if not files:
        return engine.path
    there = ", ".join(files)
    raise InputError(
        f"this .tflite cannot be resized and was made for batch {there}, not {batch}", f"build it with --batch {there},{batch}"
    )


class LiteRtSession:
    """An interpreter with its tensors allocated for one batch."""

    def __init__(self, path: Path, signature: Signature, request: OpenRequest) -> None:
        model = litert_flatbuffer.read(path)
        counts = litert_flatbuffer.layers(model)
        self.signature = signature
        self.device = "cpu"
        self.threads = request.threads
        self.precision, self.notes = _really(request.precision, counts)
        self._request = request
        self._interpreter: Any | None = _interpreter(path, request.threads)
        self._inputs, self._outputs = self._allocated(path)
        if any(np.dtype(d["dtype"]) == np.int8 for d in self._inputs.values()):
            self.notes = (*self.notes, "INT8 inputs and outputs: quantizing them is not in the timed call")

    def infer(self, feeds: Feeds) -> Outputs:
        """Outputs by name, copied out, in the signature's types. Raises InputError for feeds that do not fit, BackendFailed."""
        self.bind(feeds)()
        interpreter = self._open()
        return {
            spec.name: _real(interpreter.get_tensor(self._outputs[spec.name]["index"]), self._outputs[spec.name], spec.dtype)
            for spec in self.signature.outputs
        }

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """One run: the inputs copied into the interpreter's own memory, then `invoke`; its outputs lie on the host."""
        interpreter = self._open()
        arrays = opened.ready(self.signature, self._request, feeds, static=True)
        values = [(self._inputs[n]["index"], _engine_type(n, array, self._inputs[n])) for n, array in arrays.items()]
        set_tensor, invoke = interpreter.set_tensor, interpreter.invoke

        def run() -> object:
            try:
                for index, value in values:
                    set_tensor(index, value)
                return invoke()
            except (RuntimeError, ValueError) as exc:
                raise BackendFailed(f"LiteRT failed while running: {opened.first_line(exc)}", "check the inputs' values") from exc

        return run

    def close(self) -> None:
        """Frees the interpreter; a second time does nothing."""
        self._interpreter = None

    def _open(self) -> Any:
        if self._interpreter is None:
            raise BackendFailed("this LiteRT session is closed", "open the engine again")
        return self._interpreter

    def _allocated(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Details of inputs and outputs by name, once the tensors have the opened batch's shapes."""
        interpreter = self._open()
        shapes = self.signature.shapes(self._request.batch, self._request.shapes)
        try:
            inputs, outputs = _details(interpreter)
            self._require_names(path, inputs, outputs)
            for name, shape in shapes.items():
                if tuple(inputs[name]["shape"]) != shape:
                    interpreter.resize_tensor_input(inputs[name]["index"], shape)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as exc:
            raise BackendFailed(
                f"LiteRT cannot allocate {path.name} for {shapes}: {opened.first_line(exc)}", "build the engine at this batch"
            ) from exc
        return inputs, outputs

    def _require_names(self, path: Path, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        for kind, specs, found in (("inputs", self.signature.inputs, inputs), ("outputs", self.signature.outputs, outputs)):
            wanted = {s.name for s in specs}
            if wanted != set(found):
                raise ModelError(
                    f"{path.name} has the {kind} {sorted(found)}, its manifest says {sorted(wanted)}", "build the engine again"
                )


def _interpreter(path: Path, threads: int) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    try:
        return Interpreter(model_path=str(path), num_threads=threads)
    except ValueError as exc:
        raise ModelError(f"LiteRT cannot read {path.name}: {opened.first_line(exc)}", "build it again") from exc
    except RuntimeError as exc:
        raise BackendFailed(f"LiteRT cannot open {path.name}: {opened.first_line(exc)}") from exc


def _details(interpreter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Details of the inputs and outputs by name. The runner must be gone before the interpreter allocates anything."""
    runner = interpreter.get_signature_runner()
    return runner.get_input_details(), runner.get_output_details()


def _really(asked: str, counts: Mapping[str, int]) -> tuple[str, tuple[str, ...]]:
    """The precision of most convolutions and matrix products, and a note where it is not the one asked for, or not of all.

    FP16 weights are made FP32 when the file is opened: XNNPACK computes them in FP32 on x86.
    """
    if not counts:
        return "fp32", ("no convolution or matrix product in this graph",)
    most = max(counts, key=lambda kind: (counts[kind], kind == asked))
    shares = ", ".join(f"{n} in {kind}" for kind, n in counts.items())
    if most == "fp16":
        return "fp32", (f"weights stored in FP16, computed in FP32 (convolutions and matrix products: {shares})",)
    return most, (() if set(counts) == {asked} else (f"convolutions and matrix products: {shares}",))


def _engine_type(name: str, array: NDArray[Any], details: Mapping[str, Any]) -> NDArray[Any]:
    """`array` in the type the file takes: the same, INT32 for INT64, or quantized with the input's own scale."""
    wanted = np.dtype(details["dtype"])
    if array.dtype == wanted:
        return array
    limits = np.iinfo(wanted) if wanted.kind in "iu" else None
    scale, zero_point = details["quantization"]
    if limits is not None and array.dtype.kind == "f" and scale:
        quantized: NDArray[Any] = np.clip(np.rint(array / scale) + zero_point, limits.min, limits.max).astype(wanted)
        return quantized
    if limits is not None and array.size and (array.min() < limits.min or array.max() > limits.max):
        raise InputError(f"input '{name}' holds values that do not fit {wanted}, which the .tflite takes", "use smaller numbers")
    return array.astype(wanted)


def _real(array: NDArray[Any], details: Mapping[str, Any], dtype: str) -> NDArray[Any]:
    """The output as the signature has it: quantized ones made real with their own scale."""
    scale, zero_point = details["quantization"]
    if array.dtype.kind in "iu" and np.dtype(dtype).kind == "f" and scale:
        real: NDArray[Any] = (array.astype(np.float32) - zero_point) * scale
        return real.astype(dtype)
    return array.astype(dtype, copy=False)


BACKEND = LiteRt()
