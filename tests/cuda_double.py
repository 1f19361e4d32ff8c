"""A GPU in memory, for tests of the runner: streams that run only when waited for, memory that can be freed too early.

It checks order (profile, shapes, addresses, one uncaptured run before a capture), sizes, streams and lifetimes, the way a
GPU would punish them. What a kernel computes is y = 2 * sum of x over its last axis.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Op = Callable[[], None]


@dataclass
class Stream:
    waiting: list[tuple[Op, tuple[int, ...]]] = field(default_factory=list)  # operations and the memory they touch


class Double:
    """The device protocol over plain arrays. `log` is every call in order."""

    adapter = "double"

    def __init__(
        self, *, captures: bool = True, compute_s: float = 1e-3, copy_s: float = 1e-5, capture_fails: bool = False
    ) -> None:
        self.captures, self.compute_s, self.copy_s, self.capture_fails = captures, compute_s, copy_s, capture_fails
        self.memory: dict[int, np.ndarray] = {}
        self.pins: dict[int, np.ndarray] = {}
        self.streams: dict[int, Stream] = {}
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.events: dict[int, float | None] = {}
        self.graphs: dict[int, list[tuple[Op, tuple[int, ...]]]] = {}
        self.capturing: list[tuple[Op, tuple[int, ...]]] | None = None
        self.clock = 0.0
        self.log: list[str] = []
        self._next = 1000

    def _handle(self) -> int:
        self._next += 16
        return self._next

    def put(self, stream: int, op: Op, touches: tuple[int, ...]) -> None:
        """Puts an operation on a stream, or into the graph being captured."""
        assert stream in self.streams, "work on a stream that does not exist (or on the default one)"
        if self.capturing is not None:
            self.capturing.append((op, touches))
        else:
            self.streams[stream].waiting.append((op, touches))

    def _unused(self, handle: int) -> None:
        for stream in self.streams.values():
            assert all(handle not in touches for _, touches in stream.waiting), "memory given back while work waits for it"

    def allocate(self, size: int) -> int:
        assert size > 0
        address = self._handle()
        self.memory[address] = np.full(size, 0xAB, np.uint8)
        return address

    def free(self, address: int) -> None:
        self._unused(address)
        del self.memory[address]

    def pin(self, size: int) -> np.ndarray:
        memory = np.full(size, 0xCD, np.uint8)
        self.pins[id(memory)] = memory
        return memory

    def unpin(self, memory: np.ndarray) -> None:
        self._unused(id(memory))
        del self.pins[id(memory)]

    def clear(self, address: int, size: int, stream: int) -> None:
        assert size <= self.memory[address].nbytes

        def op() -> None:
            self.memory[address][:size] = 0

        self.log.append("clear")
        self.put(stream, op, (address,))

    def copy_in(self, address: int, source: np.ndarray, stream: int) -> None:
        assert id(source) in self.pins, "a copy from memory that is not pinned"
        assert source.nbytes <= self.memory[address].nbytes

        def op() -> None:
            self.clock += self.copy_s
            self.memory[address][: source.nbytes] = source

        self.log.append("h2d")
        self.put(stream, op, (address, id(source)))

    def copy_out(self, target: np.ndarray, address: int, stream: int) -> None:
        assert id(target) in self.pins, "a copy to memory that is not pinned"
        assert target.nbytes <= self.memory[address].nbytes

        def op() -> None:
            self.clock += self.copy_s
            target[:] = self.memory[address][: target.nbytes]

        self.log.append("d2h")
        self.put(stream, op, (address, id(target)))

    def create_stream(self) -> int:
        handle = self._handle()
        self.streams[handle] = Stream()
        return handle

    def destroy_stream(self, stream: int) -> None:
        assert not len(self.contexts), "a stream destroyed before the context that runs on it"
        assert not self.streams[stream].waiting, "a stream destroyed with work on it"
        del self.streams[stream]

    def synchronize(self, stream: int) -> None:
        assert self.capturing is None, "synchronized while capturing"
        waiting, self.streams[stream].waiting = self.streams[stream].waiting, []
        for op, _ in waiting:
            op()
        self.log.append("sync")

    def create_event(self) -> int:
        handle = self._handle()
        self.events[handle] = None
        return handle

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def record(self, event: int, stream: int) -> None:
        def op() -> None:
            self.events[event] = self.clock

        self.put(stream, op, ())

    def elapsed_s(self, start: int, end: int) -> float:
        first, last = self.events[start], self.events[end]
        assert first is not None, "an event read before it was recorded and waited for"
        assert last is not None, "an event read before it was recorded and waited for"
        return last - first

    def capture(self, work: Callable[[], None], stream: int) -> int:
        from deploykit.errors import BackendFailed

        assert not self.streams[stream].waiting, "capture begun with work waiting"
        if self.capture_fails:
            raise BackendFailed("cudaStreamEndCapture: operation not permitted when stream is capturing")
        self.capturing = []
        try:
            work()
        finally:
            made, self.capturing = self.capturing, None
        handle = self._handle()
        self.graphs[handle] = made
        self.log.append("capture")
        return handle

    def launch(self, graph: int, stream: int) -> None:
        self.log.append("launch")
        for op, touches in self.graphs[graph]:
            self.put(stream, op, touches)

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    @property
    def leaks(self) -> dict[str, int]:
        """What was not given back, by kind."""
        kinds = {"memory": self.memory, "pins": self.pins, "streams": self.streams, "events": self.events, "graphs": self.graphs}
        return {name: len(kept) for name, kept in kinds.items() if kept}


class Module:
    """A TensorRT module over the double: one engine, x float32 [batch, 3, 4] -> y float32 [batch, 3]. No profiles: the engine
    is static, at batch 2. `contexts`: those that still live."""

    __name__ = "tensorrt_double"
    __version__ = "0"

    class ILogger:
        def __init__(self) -> None:
            pass

    def __init__(self, gpu: Double, profiles: list[tuple[int, int, int]]) -> None:
        self.gpu, self.profiles = gpu, profiles
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        gpu.contexts = self.contexts

    def Runtime(self, logger: Any) -> Any:
        return Runtime(self, logger)

    @staticmethod
    def nptype(dtype: Any) -> Any:
        if dtype == "bf16":
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return np.dtype(dtype)


class _Severity:
    name = "ERROR"


class Runtime:
    def __init__(self, trt: Module, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        if not data.startswith(b"plan"):
            self.logger.log(_Severity, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag does not match)")
            return None
        return Engine(self.trt)


class Engine:
    input_dtype = "float32"
    output_dtype = "float32"
    output_name = "y"

    def __init__(self, trt: Module) -> None:
        self.trt = trt
        self.num_io_tensors = 2
        self.num_optimization_profiles = max(len(trt.profiles), 1)  # a static engine has one, too

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1 if self.trt.profiles else 2, 3, 4)[: 3 if name == "x" else 2]

    def get_tensor_name(self, index: int) -> str:
        return ("x", self.output_name)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return self.input_dtype if name == "x" else self.output_dtype

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert name == "x"
        if not self.trt.profiles:
            return [(-1,)] * 3  # what a static engine answers is documented nowhere: nothing may rest on it
        return [(b, 3, 4) for b in self.trt.profiles[profile]]

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.gpu = engine, engine.trt.gpu
        self.profile: int | None = None
        self.shape: tuple[int, ...] | None = None
        self.inferred = False
        self.addresses: dict[str, int] = {}
        self.ran: set[tuple[int, ...]] = set()
        engine.trt.contexts.add(self)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.gpu.log.append(f"profile {index}")

        def op() -> None:
            self.profile = index

        self.gpu.put(stream, op, ())
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "a shape set before the profile was there"
        self.gpu.log.append("shape")
        self.shape = tuple(shape)
        if not self.engine.trt.profiles:
            return self.shape == self.engine.get_tensor_shape(name)
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        self.inferred = True
        return [] if self.shape else ["x"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.inferred
        assert self.shape is not None
        return self.shape if name == "x" else self.shape[:2]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.gpu.memory
        width = np.dtype(self.engine.get_tensor_dtype(name)).itemsize
        assert self.gpu.memory[address].nbytes >= width * int(np.prod(self.get_tensor_shape(name)))
        self.gpu.log.append(f"address {name}")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream != 0, "the default stream"
        assert self.shape is not None
        assert set(self.addresses) == {"x", "y"}
        if self.gpu.capturing is not None:
            assert self.shape in self.ran, "captured without an uncaptured run at this shape"
        self.ran.add(self.shape)
        x_at, y_at, shape = self.addresses["x"], self.addresses["y"], self.shape

        def op() -> None:
            self.gpu.clock += self.gpu.compute_s
            kind = np.dtype(self.engine.input_dtype)
            x = self.gpu.memory[x_at][: kind.itemsize * int(np.prod(shape))].view(kind).reshape(shape)
            if kind.kind == "i":
                assert x.min() >= 0 and x.max() < 1000, "indices that point outside the table: device memory as it came"
            y = (2 * x.sum(axis=-1)).astype(self.engine.output_dtype)
            self.gpu.memory[y_at][: y.nbytes] = y.reshape(-1).view(np.uint8)

        self.gpu.log.append("enqueue")
        self.gpu.put(stream, op, (x_at, y_at))
        return True


class RtxModule(Module):
    """The same with TensorRT-RTX's own ways: a runtime configuration, its cache, and capture by itself."""

    class CudaGraphStrategy:
        DISABLED, WHOLE_GRAPH_CAPTURE = "disabled", "whole"

    class DynamicShapesKernelSpecializationStrategy:
        LAZY, EAGER, NONE = "lazy", "eager", "none"

    def __init__(self, gpu: Double, profiles: list[tuple[int, int, int]]) -> None:
        super().__init__(gpu, profiles)
        self.configs: list[RuntimeConfig] = []

    def Runtime(self, logger: Any) -> Any:
        runtime = Runtime(self, logger)
        runtime.deserialize_cuda_engine = lambda data: RtxEngine(self) if data.startswith(b"plan") else None  # type: ignore[method-assign]
        return runtime


class RtxEngine(Engine):
    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig | None = None) -> Context:
        assert config is not None
        assert isinstance(self.trt, RtxModule)
        self.trt.configs.append(config)
        return RtxContext(self)


class RtxContext(Context):
    capturable = True

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream in self.gpu.streams
        return self.capturable


class RuntimeConfig:
    cuda_graph_strategy = "disabled"
    dynamic_shapes_kernel_specialization_strategy = "lazy"
    cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    loaded = b""

    def deserialize(self, blob: bytes) -> bool:
        self.loaded = blob
        return blob.startswith(b"cache")

    def serialize(self) -> bytes:
        return b"cache of kernels"
