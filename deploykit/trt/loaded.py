"""LoadedPlan: a deserialized plan at one shape, with its device memory, ready to be put on its stream.

Order: choose the profile, set the input shapes, let the context infer the rest, set every address, run once uncaptured,
then capture what later runs launch (TensorRT-RTX captures by itself, when asked to).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import write_atomically
from deploykit.errors import BackendFailed, DeploykitError, InputError
from deploykit.signature import Signature
from deploykit.trt.device import Device
from deploykit.trt.log import recorder

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Port:
    """One input or output at the opened shape: where it lies on the device."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    address: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class LoadedPlan:
    """A plan on its stream. `ports` by name, `notes` on graph and first run, `captured` whether a CUDA graph is used.

    `close` gives everything back, what was made last first. Raises what its parts raise, with nothing left behind.
    """

    def __init__(
        self, trt: Any, gpu: Device, path: Path, signature: Signature, shapes: Shapes, runtime_cache: Path | None = None
    ) -> None:
        self._trt, self._gpu, self._shapes, self._cache_path = trt, gpu, shapes, runtime_cache
        self.notes: list[str] = []
        self._resources = ExitStack()
        self._graph: int | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._cache: Any = None
        self._cached = b""
        self._rtx_captures = False
        try:
            self._load(path)
            self._choose_profile()
            self.ports = self._allocate(signature)
            self._first_run(signature)
            self._capture()
            self._save_runtime_cache()
        except BaseException:
            self._resources.close()
            raise

    @property
    def captured(self) -> bool:
        """Whether runs are launched as a CUDA graph."""
        return self._rtx_captures or self._graph is not None

    def compute(self) -> None:
        """Puts one run on the stream."""
        if self._graph is not None:
            self._gpu.launch(self._graph, self.stream)
        else:
            self._enqueue()

    def close(self) -> None:
        """Gives everything back."""
        self._resources.close()

    def _load(self, path: Path) -> None:
        """Deserializes, then makes the stream and the context."""
        trt = self._trt
        self._logger, self._heard = recorder(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BackendFailed(
                f"{trt.__name__} {trt.__version__} cannot load {path.name}: {self._heard.first_error() or 'no reason given'}",
                "an engine runs with the version and on the GPU generation it was built for; build it again here",
            )
        self._resources.callback(self._drop)
        self.stream = self._own(self._gpu.create_stream(), self._gpu.destroy_stream)
        start = time.perf_counter()
        self._resources.callback(self._drop_context)
        self._context = self._create_context()
        self._context_s = time.perf_counter() - start

    def _drop_context(self) -> None:
        """After a captured graph and before the stream that it ran on."""
        self._context = self._cache = None

    def _drop(self) -> None:
        """Context before engine, engine before runtime: TensorRT asks for this order."""
        self._drop_context()
        self._engine = None
        self._runtime = None

    def _own(self, handle: int, give_back: Callable[[int], None]) -> int:
        self._resources.callback(give_back, handle)
        return handle

    def _create_context(self) -> Any:
        """The execution context; RTX's with whole-graph capture, eager kernels and its runtime cache, where one is named."""
        trt, engine = self._trt, self._engine
        self._rtx = hasattr(engine, "create_runtime_config") and hasattr(trt, "CudaGraphStrategy")
        if self._rtx:
            runtime_config = engine.create_runtime_config()
            runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            runtime_config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if self._cache_path is not None:
                self._cache = runtime_config.create_runtime_cache()
                self._cached = self._read_runtime_cache(self._cache_path)
                if self._cached and not self._cache.deserialize(self._cached):
                    self.notes.append("runtime cache: made for another GPU, driver or version; made anew")
                    self._cached = b""
                runtime_config.set_runtime_cache(self._cache)
            context = engine.create_execution_context(runtime_config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise self._refused("an execution context")
        return context

    def _read_runtime_cache(self, path: Path) -> bytes:
        """The kernels that an earlier process has kept; none where they cannot be read."""
        try:
            return path.read_bytes() if path.is_file() else b""
        except OSError as exc:
            self.notes.append(f"runtime cache: not read ({exc})")
            return b""

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
        if not self._context.set_optimization_profile_async(best[1], self.stream):
            raise self._refused(f"profile {best[1]}")
        self._gpu.synchronize(self.stream)
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
            fixed = tuple(self._engine.get_tensor_shape(name))
            if -1 not in fixed:  # a static input has no range of its own
                if fixed != shape:
                    return None
                continue
            low, best, high = (tuple(s) for s in self._engine.get_tensor_profile_shape(name, profile))
            if len(low) != len(shape) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return None
            total += abs(int(np.prod(shape)) - int(np.prod(best)))
        return total

    def _taken(self) -> str:
        shapes = {name: tuple(self._engine.get_tensor_shape(name)) for name in self._shapes}
        name = next((name for name, shape in shapes.items() if -1 in shape), None)
        if name is None:
            return _shapes_said(shapes)
        ranges = []
        for index in range(self._engine.num_optimization_profiles):
            low, _, high = self._engine.get_tensor_profile_shape(name, index)
            ranges.append(f"{name} {tuple(low)} to {tuple(high)}")
        return "; ".join(ranges)

    def _allocate(self, signature: Signature) -> dict[str, Port]:
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
            ports[name] = Port(name, dtype, shape, self._own(self._gpu.allocate(max(size, 1)), self._gpu.free))
        expected = {spec.name for spec in (*signature.inputs, *signature.outputs)}
        if set(ports) != expected:
            raise InputError(
                f"the engine has the tensors {sorted(ports)}, its manifest says {sorted(expected)}",
                "the manifest belongs to another engine; build it again",
            )
        return ports

    def _first_run(self, signature: Signature) -> None:
        """One run on zeros: TensorRT asks for it before a capture, and RTX compiles in it. Device memory as it comes would
        hold wild indices for an integer input."""
        for port in self.ports.values():
            if not self._context.set_tensor_address(port.name, port.address):
                raise self._refused(f"the address of '{port.name}'")
        for spec in signature.inputs:
            port = self.ports[spec.name]
            self._gpu.clear(port.address, max(port.size, 1), self.stream)
        self._gpu.synchronize(self.stream)
        start = time.perf_counter()
        self._enqueue()
        self._gpu.synchronize(self.stream)
        self._first_run_s = time.perf_counter() - start

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self.stream):
            raise self._refused("a run")

    def _capture(self) -> None:
        """A CUDA graph of the compute for the opened shape, after the uncaptured run that TensorRT asks for."""
        if self._rtx:
            self._rtx_captures = bool(self._context.is_stream_capturable(self.stream))
            said = (
                "on (TensorRT-RTX's whole-graph capture)"
                if self._rtx_captures
                else "off (TensorRT-RTX cannot capture this graph)"
            )
            self.notes.append(f"CUDA graph: {said}")
            kernels = (
                "taken from the runtime cache" if self._cached and self._kernels() == self._cached else "compiled for this GPU"
            )
            self.notes.append(
                f"ready after {(self._context_s + self._first_run_s) * 1e3:.1f} ms (context {self._context_s * 1e3:.1f}, first run "
                f"{self._first_run_s * 1e3:.1f}): kernels {kernels}, not in the timings"
            )
            return
        if not self._gpu.captures:
            self.notes.append(f"CUDA graph: off ({self._gpu.adapter} has none)")
            return
        try:
            graph = self._gpu.capture(self._enqueue, self.stream)
        except DeploykitError as exc:
            self.notes.append(f"CUDA graph: off (capture failed: {exc.message})")
            return
        self._graph = self._own(graph, self._gpu.destroy_graph)
        self.notes.append("CUDA graph: on")

    def _kernels(self) -> bytes:
        """The runtime cache as it is now: what was loaded, and what was compiled since."""
        return bytes(memoryview(self._cache.serialize()))

    def _save_runtime_cache(self) -> None:
        """Keeps the kernels for the next process, where that can be written; they can always be compiled again."""
        if self._cache is None or self._cache_path is None:
            return
        kernels = self._kernels()
        if kernels == self._cached:
            return
        try:
            write_atomically(self._cache_path, kernels)
        except (OSError, DeploykitError) as exc:
            self.notes.append(f"runtime cache: not kept ({exc})")

    def _refused(self, what: str) -> BackendFailed:
        return BackendFailed(f"{self._trt.__name__} refused {what}: {self._heard.first_error() or 'no reason given'}")


def _shapes_said(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
