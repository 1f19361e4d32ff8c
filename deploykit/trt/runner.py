"""EngineSession: a deserialized plan on a GPU, host in and host out, for TensorRT and TensorRT-RTX.

Order, for one shape: choose the profile, set the input shapes, let the context infer the rest, set every address, run once
uncaptured, then capture what later runs launch (RTX captures by itself, when asked to).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Artifact, write_atomically
from deploykit.errors import BackendFailed, DeploykitError, InputError
from deploykit.session import OpenRequest
from deploykit.signature import Feeds, Outputs, Signature
from deploykit.trt import timing
from deploykit.trt.device import Bytes, Device
from deploykit.trt.log import recorder

PROBE_RUNS = 20


@dataclass(frozen=True)
class _Port:
    """One input or output at the opened shape: where it lies on the device."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    address: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class EngineSession:
    """A session on a plan, as `deploykit.session.Session` asks for; `split` adds where the time went."""

    def __init__(self, trt: Any, device: Device, engine: Artifact, request: OpenRequest, where: str) -> None:
        self.signature: Signature = engine.signature
        self.device = where
        self.threads = 1  # one host thread enqueues; the work is the GPU's
        self._trt, self._gpu, self._request = trt, device, request
        self._shapes = engine.signature.shapes(request.batch, request.shapes)
        self._resources = ExitStack()
        self._graph: int | None = None
        self._own_buffers: tuple[dict[str, Bytes], dict[str, Bytes]] | None = None
        self._closed = False
        try:
            self._prepare(engine.path)
            self.precision, said = _actual(engine)
            self.notes: tuple[str, ...] = (*self._notes, *said, *self._probe())
        except BaseException:
            self._resources.close()
            raise

    def _prepare(self, path: Path) -> None:
        """Deserializes, then makes stream, context, buffers and, where it can be, the graph. What is made first is
        given back last."""
        trt, gpu = self._trt, self._gpu
        self._notes: list[str] = []
        self._logger, self._heard = recorder(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BackendFailed(
                f"{trt.__name__} {trt.__version__} cannot load {path.name}: {self._heard.first_error() or 'no reason given'}",
                "an engine runs with the version and on the GPU generation it was built for; build it again here",
            )
        self._resources.callback(self._drop)
        self._stream = gpu.create_stream()
        self._resources.callback(gpu.destroy_stream, self._stream)
        self._context = self._create_context()
        self._choose_profile()
        self._ports = self._allocate()
        for port in self._ports.values():
            if not self._context.set_tensor_address(port.name, port.address):
                raise self._refused(f"the address of '{port.name}'")
        self._events = [self._own(gpu.create_event(), gpu.destroy_event) for _ in range(4)]
        start = time.perf_counter()
        self._enqueue()
        gpu.synchronize(self._stream)
        self._first_run_s = time.perf_counter() - start
        self._capture()
        self._save_runtime_cache()

    def _create_context(self) -> Any:
        """The execution context; RTX's with whole-graph capture, eager kernels and its runtime cache, where one is named."""
        trt, engine = self._trt, self._engine
        self._rtx = hasattr(engine, "create_runtime_config") and hasattr(trt, "CudaGraphStrategy")
        self._cache: Any = None
        if self._rtx:
            runtime_config = engine.create_runtime_config()
            runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            runtime_config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if self._cache_path is not None:
                self._cache = runtime_config.create_runtime_cache()
                if self._cache_path.is_file() and not self._cache.deserialize(self._cache_path.read_bytes()):
                    self._notes.append("runtime cache: made for another GPU, driver or version; made anew")
                runtime_config.set_runtime_cache(self._cache)
            context = engine.create_execution_context(runtime_config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise self._refused("an execution context")
        return context

    @property
    def _cache_path(self) -> Path | None:
        named = self._request.options.get("runtime_cache")
        return Path(str(named)) if named else None

    def _choose_profile(self) -> None:
        """The profile that takes the opened shapes and whose best shape is nearest; then the shapes themselves."""
        best: tuple[int, int] | None = None
        for index in range(self._engine.num_optimization_profiles):
            distance = self._distance(index)
            if distance is not None and (best is None or distance < best[0]):
                best = (distance, index)
        if best is None:
            raise InputError(
                f"no profile of this engine takes {_shapes_said(self._shapes)}",
                f"it takes {self._taken()}; build it again with that batch in --batch (or that shape in --shapes)",
            )
        if not self._context.set_optimization_profile_async(best[1], self._stream):
            raise self._refused(f"profile {best[1]}")
        self._gpu.synchronize(self._stream)
        for name, shape in self._shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._refused(f"shape {shape} of input '{name}'")
        try:
            unknown = self._context.infer_shapes()
        except RuntimeError as exc:
            raise self._refused(f"the shapes {_shapes_said(self._shapes)}") from exc
        if unknown:
            raise BackendFailed(f"the engine cannot tell its shapes without the values of {', '.join(unknown)}")

    def _distance(self, profile: int) -> int | None:
        """How many elements the opened shapes are from a profile's best ones; None where it does not take them."""
        total = 0
        for name, shape in self._shapes.items():
            low, best, high = (tuple(s) for s in self._engine.get_tensor_profile_shape(name, profile))
            if len(low) != len(shape) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return None
            total += abs(int(np.prod(shape)) - int(np.prod(best)))
        return total

    def _taken(self) -> str:
        name = next(iter(self._shapes))
        ranges = []
        for index in range(self._engine.num_optimization_profiles):
            low, _, high = self._engine.get_tensor_profile_shape(name, index)
            ranges.append(f"{name} {tuple(low)} to {tuple(high)}")
        return "; ".join(ranges)

    def _allocate(self) -> dict[str, _Port]:
        """Device memory for every tensor at the opened shapes, inputs and outputs held against the signature's names."""
        trt, engine = self._trt, self._engine
        ports = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            shape = tuple(int(d) for d in self._context.get_tensor_shape(name))
            if any(d < 0 for d in shape):
                raise BackendFailed(f"the shape of '{name}' depends on the data ({shape})", "cut the graph before that output")
            try:
                dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
            except TypeError as exc:
                raise BackendFailed(f"'{name}' has a type that numpy lacks: {engine.get_tensor_dtype(name)}") from exc
            size = int(np.prod(shape)) * dtype.itemsize
            ports[name] = _Port(name, dtype, shape, self._own(self._gpu.allocate(max(size, 1)), self._gpu.free))
        self._inputs = [s.name for s in self.signature.inputs]
        self._outputs = [s.name for s in self.signature.outputs]
        if set(ports) != {*self._inputs, *self._outputs}:
            raise InputError(
                f"the engine has the tensors {sorted(ports)}, its manifest says {sorted({*self._inputs, *self._outputs})}",
                "the manifest belongs to another engine; build it again",
            )
        return ports

    def _own(self, handle: int, give_back: Callable[[int], None]) -> int:
        self._resources.callback(give_back, handle)
        return handle

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise self._refused("a run")

    def _capture(self) -> None:
        """A CUDA graph of the compute for the opened shape, after the uncaptured run that TensorRT asks for."""
        if self._rtx:
            self._notes.append("CUDA graph: on (TensorRT-RTX's whole-graph capture)")
            self._notes.append(f"first run {self._first_run_s * 1e3:.1f} ms: kernels compiled for this GPU, not in the timings")
            return
        if not self._gpu.captures:
            self._notes.append(f"CUDA graph: off ({self._gpu.adapter} has none)")
            return
        try:
            graph = self._gpu.capture(self._enqueue, self._stream)
        except DeploykitError as exc:
            self._notes.append(f"CUDA graph: off (capture failed: {exc.message})")
            return
        self._graph = self._own(graph, self._gpu.destroy_graph)
        self._notes.append("CUDA graph: on")

    def _compute(self) -> None:
        if self._graph is not None:
            self._gpu.launch(self._graph, self._stream)
        else:
            self._enqueue()

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """A call that copies these inputs in, runs, copies the outputs out and waits: host in, host out.

        The inputs are put into pinned memory here, once, as an application would receive them there.
        """
        sources, targets = self._pin(feeds)

        def run() -> object:
            self._transfer_in(sources)
            self._compute()
            self._transfer_out(targets)
            self._gpu.synchronize(self._stream)
            return targets

        return run

    def infer(self, feeds: Feeds) -> Outputs:
        """Finished outputs on the host, in arrays of their own."""
        sources, targets = self._desk(feeds)
        self._transfer_in(sources)
        self._compute()
        self._transfer_out(targets)
        self._gpu.synchronize(self._stream)
        return {name: self._view(name, targets[name]).copy() for name in self._outputs}

    def split(self, feeds: Feeds, runs: int = PROBE_RUNS) -> tuple[timing.Split, ...]:
        """Where the time of `runs` runs went: events around H2D, compute and D2H, the host's clock around the enqueue."""
        sources, targets = self._desk(feeds)
        gpu, stream, found = self._gpu, self._stream, []
        for _ in range(runs):
            gpu.record(self._events[0], stream)
            self._transfer_in(sources)
            gpu.record(self._events[1], stream)
            start = time.perf_counter()
            self._compute()
            enqueue_s = time.perf_counter() - start
            gpu.record(self._events[2], stream)
            self._transfer_out(targets)
            gpu.record(self._events[3], stream)
            gpu.synchronize(stream)
            parts = [gpu.elapsed_s(a, b) for a, b in zip(self._events[:-1], self._events[1:], strict=True)]
            found.append(timing.Split(parts[0], parts[1], parts[2], enqueue_s))
        return tuple(found)

    def close(self) -> None:
        """Waits for what runs, then gives everything back, the last made first."""
        if self._closed:
            return
        self._closed = True
        try:
            self._gpu.synchronize(self._stream)
        finally:
            self._resources.close()

    def _drop(self) -> None:
        """Context before engine, engine before runtime: TensorRT asks for this order."""
        self._context = self._cache = None
        self._engine = None
        self._runtime = None

    def _probe(self) -> tuple[str, ...]:
        """Notes from a few runs on random inputs (zeros for integers, which may be indices)."""
        rng = np.random.default_rng(0)
        feeds = {}
        for name in self._inputs:
            port = self._ports[name]
            floats = np.issubdtype(port.dtype, np.floating)
            feeds[name] = rng.standard_normal(port.shape).astype(port.dtype) if floats else np.zeros(port.shape, port.dtype)
        middle = timing.median(self.split(feeds))
        return (timing.words(middle), *timing.warnings(middle, captured=self._rtx or self._graph is not None))

    def _desk(self, feeds: Feeds) -> tuple[dict[str, Bytes], dict[str, Bytes]]:
        """The session's own pinned buffers, for runs whose outputs are copied on: pinning takes longer than a run."""
        if self._own_buffers is None:
            self._own_buffers = self._pin(feeds)
        else:
            self._write(feeds, self._own_buffers[0])
        return self._own_buffers

    def _pin(self, feeds: Feeds) -> tuple[dict[str, Bytes], dict[str, Bytes]]:
        """New pinned buffers, inputs filled; they stay until the session closes."""
        self._check(feeds)
        buffers = []
        for names in (self._inputs, self._outputs):
            made = {}
            for name in names:
                made[name] = self._gpu.pin(max(self._ports[name].size, 1))
                self._resources.callback(self._gpu.unpin, made[name])
            buffers.append(made)
        self._write(feeds, buffers[0])
        return buffers[0], buffers[1]

    def _write(self, feeds: Feeds, sources: dict[str, Bytes]) -> None:
        self._check(feeds)
        for name, memory in sources.items():
            self._view(name, memory)[...] = feeds[name]

    def _check(self, feeds: Feeds) -> None:
        if self._closed:
            raise BackendFailed("the session is closed", "open the engine again")
        self.signature.check(feeds)
        for name in self._inputs:
            if feeds[name].shape != self._ports[name].shape:
                raise InputError(
                    f"input '{name}' has shape {feeds[name].shape}, this session was opened at {self._ports[name].shape}",
                    "open the engine again at that batch",
                )

    def _view(self, name: str, memory: Bytes) -> NDArray[Any]:
        port = self._ports[name]
        return memory[: port.size].view(port.dtype).reshape(port.shape)

    def _transfer_in(self, sources: dict[str, Bytes]) -> None:
        for name, memory in sources.items():
            self._gpu.copy_in(self._ports[name].address, memory, self._stream)

    def _transfer_out(self, targets: dict[str, Bytes]) -> None:
        for name, memory in targets.items():
            self._gpu.copy_out(memory, self._ports[name].address, self._stream)

    def _save_runtime_cache(self) -> None:
        if self._cache is not None and self._cache_path is not None:
            write_atomically(self._cache_path, bytes(memoryview(self._cache.serialize())))

    def _refused(self, what: str) -> BackendFailed:
        return BackendFailed(f"{self._trt.__name__} refused {what}: {self._heard.first_error() or 'no reason given'}")


def _actual(engine: Artifact) -> tuple[str, tuple[str, ...]]:
    """The precision an engine really runs in, by the layers its manifest lists, and what to say where it differs."""
    if engine.precision not in ("int8", "mixed"):
        return engine.precision, ()
    fallback = engine.facts.get("fallback") or []
    asked = sum(row.get("Int8", 0) for row in (engine.facts.get("requested") or {}).values())
    if not fallback:
        return engine.precision, ()
    note = f"{len(fallback)} of {asked} layers that asked for INT8 run in {fallback[0]['actual']}"
    convolutions = (engine.facts.get("layers") or {}).get("convolution", {})
    only_half = len(fallback) >= asked or (convolutions and "Int8" not in convolutions)
    return ("fp16" if only_half else engine.precision), (note,)


def _shapes_said(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
