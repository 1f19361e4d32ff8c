"""ExecuTorch with XNNPACK: a .pte made of the PyTorch source, in FP32, static INT8 (PT2E) or dynamic INT8, and its own runtime.

The runtime is `executorch.extension.pybindings._C` (1.5.1), and not `portable_lib` or `executorch.runtime`: these import the
whole ahead-of-time compiler to give a name to a warning, 6 s of CPU time for each process, against 20 ms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import Artifact
from deploykit.backends import executorch_build, executorch_file, installed, opened
from deploykit.errors import BackendFailed, InputError, ModelError
from deploykit.session import BuildRequest, Missing, OpenRequest, Session
from deploykit.signature import Feeds, Outputs, Signature

NAME = "executorch"
FILE = "model.pte"
METHOD = "forward"
_GRAPHS = {"fp32": "source", "int8": "source-calibrated", "int8-dynamic": "source"}
# ScalarType of executorch/runtime/core/portable_type/scalar_type.h
_DTYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool"}
_open_threads: Counter[int] = Counter()  # thread count -> open sessions: the runtime has one pool of threads a process


class ExecuTorch:
    """The backend 'executorch'."""

    name = NAME
    opening_s = 3.0
    extra = "executorch"

    def missing(self) -> Missing | None:
        """Why ExecuTorch is not here; None when it is."""
        return installed.missing("torch", self.extra) or installed.missing("executorch", self.extra)

    def cannot_run(self) -> Missing | None:
        """The same as `missing`: XNNPACK runs on any CPU that ExecuTorch's wheels are for, and its Python binding needs torch."""
        return self.missing()

    def versions(self) -> dict[str, str]:
        """The installed ExecuTorch, the quantizer's torchao, and torch."""
        return installed.versions("executorch", "torchao", "torch")

    def precisions(self) -> tuple[str, ...]:
        """fp32, int8 and int8-dynamic."""
        return tuple(_GRAPHS)

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """FP16, BF16 and mixed precision, any target but 'cpu'."""
        if precision not in _GRAPHS:
            return Missing(
                f"deploykit makes ExecuTorch engines in fp32, int8 and int8-dynamic, not in {precision}", "use one of those"
            )
        return installed.only_cpu("ExecuTorch", target)

    def targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def all_targets(self) -> tuple[str, ...]:
        """The CPU: XNNPACK packs the weights for the machine when a .pte is loaded, so one file serves x86 and ARM."""
        return ("cpu",)

    def graph(self, precision: str) -> str:
        """The PyTorch source; with samples for static INT8, which XNNPACK's own quantizer calibrates."""
        return _GRAPHS[precision]

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """`model.pte` in `folder`, for every batch from 1 to the largest of the request, run once at the smallest and the largest.

        Raises NotForThisGraph where nothing in the model can be quantized, ModelError for a model that torch.export cannot
        trace, BackendFailed naming the operator that ExecuTorch lacks.
        """
        program = executorch_build.program(artifact, request)
        path = folder / FILE
        path.write_bytes(program.data)
        engine = Artifact(
            path=path,
            format=NAME,
            precision=request.precision,
            signature=artifact.signature,
            stage=f"build-{NAME}",
            parent=artifact.sha256 or None,
            options={"precision": request.precision},
            versions=self.versions(),
            facts={**artifact.facts, NAME: program.facts},
        )
        for batch in dict.fromkeys(program.batches):
            session = self.open(engine, OpenRequest(request.precision, batch, 1, request.shapes))
            try:
                session.infer(program.feeds(batch))
            finally:
                session.close()
        return engine

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """A session on a .pte. Raises InputError for a batch it was not built for, ModelError for a file that is none."""
        opened.require_batch(engine.signature, request)
        _require_built_for(engine, request)
        executorch_file.check(engine.path)
        return ExecuTorchSession(engine, request)


class ExecuTorchSession:
    """The method 'forward' of a .pte, in a pool of `request.threads` threads."""

    def __init__(self, engine: Artifact, request: OpenRequest) -> None:
        self._request = request
        self.signature = engine.signature
        self.device = "cpu"
        self.precision, self.notes = really(request.precision, engine.facts.get(NAME, {}))
        self._program: Any | None = None
        self._method: Any | None = None
        runtime = executorch_file.runtime()
        with executorch_file.native_log() as log:
            self._pool: int | None = _take_threads(runtime, request.threads)
            try:
                self.threads = int(runtime._threadpool_get_thread_count())
                self._program, self._method = _loaded(runtime, engine.path, log)
                _require_ports(self._method.method_meta(), engine.signature, engine.path)
            except BaseException:
                self.close()
                raise

    def infer(self, feeds: Feeds) -> Outputs:
        """Outputs by name, copied out of the runtime. Raises InputError for feeds that do not fit, BackendFailed."""
        method, tensors = self._method_or_raise(), self._tensors(feeds)
        try:
            found = method(tensors, True)
        except RuntimeError as exc:
            raise _failed(exc) from exc
        return {
            spec.name: np.array(tensor.numpy()).astype(spec.dtype, copy=False)
            for spec, tensor in zip(self.signature.outputs, found, strict=True)
        }

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """One run on tensors that share the arrays' memory: the runtime copies them to where its memory plan has them, and
        leaves the outputs in its own memory on the host."""
        method, tensors = self._method_or_raise(), self._tensors(feeds)

        def run() -> object:
            try:
                return method(tensors, False)
            except RuntimeError as exc:
                raise _failed(exc) from exc

        return run

    def close(self) -> None:
        """Frees the engine; a second time does nothing."""
        self._method = self._program = None
        if self._pool is not None:
            _open_threads[self._pool] -= 1
            self._pool = None

    def _method_or_raise(self) -> Any:
        if self._method is None:
            raise BackendFailed("this ExecuTorch session is closed", "open the engine again")
        return self._method

    def _tensors(self, feeds: Feeds) -> list[Any]:
        import torch

        arrays = opened.ready(self.signature, self._request, feeds)
        return [torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays.values()]


def really(asked: str, facts: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The precision that most convolutions and linear layers run in, and notes: which do not, and what XNNPACK did not take.

    `facts`: what `executorch_build` has counted in the program.
    """
    notes: list[str] = []
    layers, integer = int(facts.get("layers", 0)), int(facts.get("layers_int8", 0))
    precision = asked
    if asked != "fp32" and facts:
        precision = asked if 2 * integer >= layers and integer else "fp32"
        if integer < layers:
            rest = list(facts.get("layers_float", []))
            named = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
            notes.append(f"{integer} of {layers} convolutions and linear layers in {asked}; in FP32: {named}")
    left: Mapping[str, int] = facts.get("not_delegated", {})
    if left:
        named = ", ".join(f"{op} x{n}" if n > 1 else op for op, n in left.items())
        whole = int(facts["delegated"]) + sum(left.values())
        notes.append(f"XNNPACK runs {facts['delegated']} of {whole} operators; ExecuTorch's portable kernels run {named}")
    return precision, tuple(notes)


def _require_built_for(engine: Artifact, request: OpenRequest) -> None:
    """Raises InputError for a batch outside the range that the .pte was built for."""
    built = engine.facts.get(NAME, {}).get("batches")
    if built and not built[0] <= request.batch <= built[1]:
        span = f"batch {built[0]}" if built[0] == built[1] else f"batches {built[0]} to {built[1]}"
        raise InputError(
            f"{engine.path.name} was built for {span}, not for batch {request.batch}",
            f"build it again with --batch {built[0]},{request.batch}",
        )


def _take_threads(runtime: Any, threads: int) -> int:
    """Sizes the process's one pool of threads, and counts this session in. Raises BackendFailed where a session of another
    size is open: XNNPACK keeps a pointer to the pool that it was opened with."""
    others = [n for n, sessions in _open_threads.items() if sessions > 0 and n != threads]
    if others:
        raise BackendFailed(
            f"an ExecuTorch session on {others[0]} threads is open in this process, and {threads} were asked for",
            "close it first, or open one of them in a process of its own",
        )
    if runtime._threadpool_get_thread_count() != threads:
        runtime._unsafe_reset_threadpool(threads)
    _open_threads[threads] += 1
    return threads


def _loaded(runtime: Any, path: Path, log: executorch_file.Log) -> tuple[Any, Any]:
    """(program, its method), weights packed."""
    try:
        program = runtime._load_program(str(path))
        return program, program.load_method(METHOD)
    except (RuntimeError, ValueError) as exc:
        raise BackendFailed(
            f"ExecuTorch cannot load {path.name}: {executorch_file.reason(log.text()) or opened.first_line(exc)}",
            "build the engine again; a file of another ExecuTorch version may use operators that this one lacks",
        ) from exc


def _require_ports(meta: Any, signature: Signature, path: Path) -> None:
    """Raises ModelError unless the file's inputs and outputs are the manifest's: number, dtypes, ranks, fixed sizes."""
    sides = (
        ("input", meta.num_inputs(), meta.input_tensor_meta, signature.inputs),
        ("output", meta.num_outputs(), meta.output_tensor_meta, signature.outputs),
    )
    for side, count, tensor, specs in sides:
        found = [(_DTYPES.get(int(tensor(i).dtype()), "?"), tuple(tensor(i).sizes())) for i in range(count)]
        fits = count == len(specs) and all(
            dtype == spec.dtype
            and len(sizes) == len(spec.shape)
            and all(isinstance(d, str) or d == n for d, n in zip(spec.shape, sizes, strict=True))
            for (dtype, sizes), spec in zip(found, specs, strict=True)
        )
        if not fits:
            shown = ", ".join(f"{dtype}{list(sizes)}" for dtype, sizes in found)
            named = ", ".join(map(str, specs))
            raise ModelError(f"{path.name} has the {side}s {shown}, its manifest says {named}", "build the engine again")


def _failed(exc: Exception) -> BackendFailed:
    return BackendFailed(f"ExecuTorch failed while running: {opened.first_line(exc)}", "check the inputs' values and shapes")


BACKEND = ExecuTorch()
