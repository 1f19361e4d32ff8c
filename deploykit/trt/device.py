"""Device: the few CUDA calls the runner needs, behind one small protocol with two adapters, cuda-python and pycuda.

Streams, events and graphs are plain integers, so that the runner (and its test double) knows nothing of either package.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.children import has_module
from deploykit.errors import BackendFailed, MissingBackend, UnknownName

Bytes = NDArray[np.uint8]
ADAPTERS = ("cuda-python", "pycuda")


class Device(Protocol):
    """One GPU. Every call raises BackendFailed with CUDA's own words when CUDA refuses; sizes are bytes."""

    adapter: str
    captures: bool  # whether CUDA graphs can be captured through this adapter

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of device memory."""
        ...

    def free(self, address: int) -> None:
        """Gives device memory back."""
        ...

    def pin(self, size: int) -> Bytes:
        """`size` bytes of page-locked host memory."""
        ...

    def unpin(self, memory: Bytes) -> None:
        """Gives page-locked memory back."""
        ...

    def clear(self, address: int, size: int, stream: int) -> None:
        """Puts zeros into device memory, on the stream."""
        ...

    def copy_in(self, address: int, source: Bytes, stream: int) -> None:
        """Starts a copy of pinned memory to the device; it must stay unchanged until the stream is synchronized."""
        ...

    def copy_out(self, target: Bytes, address: int, stream: int) -> None:
        """Starts a copy of device memory to pinned memory."""
        ...

    def create_stream(self) -> int:
        """A stream of its own: the default one cannot be captured."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Destroys it."""
        ...

    def synchronize(self, stream: int) -> None:
        """Waits until all that was put on the stream is done."""
        ...

    def create_event(self) -> int:
        """An event that keeps times."""
        ...

    def destroy_event(self, event: int) -> None:
        """Destroys it."""
        ...

    def record(self, event: int, stream: int) -> None:
        """Puts the event on the stream."""
        ...

    def elapsed_s(self, start: int, end: int) -> float:
        """Seconds between two recorded and synchronized events (CUDA's resolution is about 0.5 us)."""
        ...

    def capture(self, work: Callable[[], None], stream: int) -> int:
        """What `work` puts on the stream, as a graph ready to launch; none of it runs."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Puts a captured graph on the stream."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Destroys it."""
        ...


def open_device(adapter: str | None = None) -> Device:
    """The first GPU through the adapter named; without a name, through cuda-python, else pycuda.

    Raises UnknownName, MissingBackend when the package or the driver is not here.
    """
    if adapter is not None and adapter not in ADAPTERS:
        raise UnknownName("CUDA adapter", adapter, ADAPTERS)
    chosen = adapter or ("cuda-python" if has_module("cuda") else "pycuda")
    if not has_module("cuda" if chosen == "cuda-python" else "pycuda"):
        raise MissingBackend(f"{chosen} is not installed", f"pip install {chosen}")
    return CudaPython() if chosen == "cuda-python" else PyCuda()


class CudaPython:
    """The device through cuda-python (`cuda.bindings.runtime` of 12.6 and later)."""

    adapter = "cuda-python"
    captures = True

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as exc:
            raise MissingBackend(f"cuda-python cannot be imported: {exc}", "pip install --upgrade cuda-python") from exc
        self._cuda: Any = runtime
        self._pinned: dict[int, int] = {}
        (error,) = runtime.cudaSetDevice(ordinal)
        if error != runtime.cudaError_t.cudaSuccess:
            raise MissingBackend(f"CUDA cannot use GPU {ordinal}: {self._said(error)}", "needs an NVIDIA GPU and its driver")

    def _said(self, error: Any) -> str:
        _, words = self._cuda.cudaGetErrorString(error)
        return words.decode() if isinstance(words, bytes) else str(words)

    def _call(self, name: str, *args: Any) -> Any:
        """What a runtime function returns beside its error code. Raises BackendFailed for any error."""
        error, *values = getattr(self._cuda, name)(*args)
        if error != self._cuda.cudaError_t.cudaSuccess:
            low_memory = error == self._cuda.cudaError_t.cudaErrorMemoryAllocation
            raise BackendFailed(f"{name}: {self._said(error)}", "use a smaller batch, or free GPU memory" if low_memory else None)
        return values[0] if values else None

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pin(self, size: int) -> Bytes:
        import ctypes

        address = int(self._call("cudaMallocHost", size))
        memory: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self._pinned[memory.ctypes.data] = address
        return memory

    def unpin(self, memory: Bytes) -> None:
        self._call("cudaFreeHost", self._pinned.pop(memory.ctypes.data))

    def clear(self, address: int, size: int, stream: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def copy_in(self, address: int, source: Bytes, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, stream)

    def copy_out(self, target: Bytes, address: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, stream)

    def create_stream(self) -> int:
        return int(self._call("cudaStreamCreate"))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def create_event(self) -> int:
        return int(self._call("cudaEventCreate"))

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def elapsed_s(self, start: int, end: int) -> float:
        return float(self._call("cudaEventElapsedTime", start, end)) * 1e-3

    def capture(self, work: Callable[[], None], stream: int) -> int:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:  # the capture must end even where `work` failed, or the stream stays unusable
            with contextlib.suppress(BackendFailed):
                half = self._call("cudaStreamEndCapture", stream)
                self._call("cudaGraphDestroy", half)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)


class PyCuda:
    """The device through pycuda (2022.1 and later), on the primary context that TensorRT shares.

    pycuda 2026.1 wraps no graph capture, so its sessions enqueue every run, and say so.
    """

    adapter = "pycuda"
    captures = False

    def __init__(self, ordinal: int = 0) -> None:
        try:
            import pycuda.driver as driver
        except (ImportError, OSError) as exc:
            raise MissingBackend(f"pycuda cannot be imported: {exc}", "needs an NVIDIA GPU and its driver") from exc
        self._cuda: Any = driver
        try:
            driver.init()
            self._context = driver.Device(ordinal).retain_primary_context()
        except driver.Error as exc:
            raise MissingBackend(f"CUDA cannot use GPU {ordinal}: {exc}", "needs an NVIDIA GPU and its driver") from exc
        self._context.push()
        atexit.register(self._context.pop)  # pycuda ends the process with abort() where a context is left on its stack
        self._kept: dict[int, Any] = {}  # pycuda frees what nobody holds

    def _keep(self, handle: int, thing: Any) -> int:
        self._kept[handle] = thing
        return handle

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except self._cuda.MemoryError as exc:
            raise BackendFailed(f"CUDA: {exc}", "use a smaller batch, or free GPU memory") from exc
        except self._cuda.Error as exc:
            raise BackendFailed(f"CUDA: {exc}") from exc

    def allocate(self, size: int) -> int:
        memory = self._try(lambda: self._cuda.mem_alloc(size))
        return self._keep(int(memory), memory)

    def free(self, address: int) -> None:
        memory = self._kept.pop(address)
        self._try(memory.free)

    def pin(self, size: int) -> Bytes:
        memory: Bytes = self._try(lambda: self._cuda.pagelocked_empty(size, np.uint8))
        return memory

    def unpin(self, memory: Bytes) -> None:
        base: Any = memory.base
        self._try(base.free)

    def clear(self, address: int, size: int, stream: int) -> None:
        self._try(lambda: self._cuda.memset_d8_async(address, 0, size, self._kept[stream]))

    def copy_in(self, address: int, source: Bytes, stream: int) -> None:
        self._try(lambda: self._cuda.memcpy_htod_async(address, source, self._kept[stream]))

    def copy_out(self, target: Bytes, address: int, stream: int) -> None:
        self._try(lambda: self._cuda.memcpy_dtoh_async(target, address, self._kept[stream]))

    def create_stream(self) -> int:
        stream = self._try(self._cuda.Stream)
        return self._keep(int(stream.handle), stream)

    def destroy_stream(self, stream: int) -> None:
        del self._kept[stream]

    def synchronize(self, stream: int) -> None:
        self._try(self._kept[stream].synchronize)

    def create_event(self) -> int:
        event = self._try(self._cuda.Event)
        return self._keep(id(event), event)

    def destroy_event(self, event: int) -> None:
        del self._kept[event]

    def record(self, event: int, stream: int) -> None:
        self._try(lambda: self._kept[event].record(self._kept[stream]))

    def elapsed_s(self, start: int, end: int) -> float:
        return float(self._try(lambda: self._kept[end].time_since(self._kept[start]))) * 1e-3

    def capture(self, work: Callable[[], None], stream: int) -> int:  # noqa: ARG002
        raise BackendFailed("pycuda cannot capture CUDA graphs", "pip install cuda-python")

    def launch(self, graph: int, stream: int) -> None:  # noqa: ARG002
        raise BackendFailed("pycuda cannot launch CUDA graphs", "pip install cuda-python")

    def destroy_graph(self, graph: int) -> None:  # noqa: ARG002
        raise BackendFailed("pycuda has no CUDA graphs", "pip install cuda-python")
