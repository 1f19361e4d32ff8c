"""EngineSession: a plan on a GPU, host in and host out, for TensorRT and TensorRT-RTX."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Artifact
from deploykit.errors import BackendFailed, InputError
from deploykit.session import OpenRequest
from deploykit.signature import Feeds, Outputs, Signature
from deploykit.trt import timing
from deploykit.trt.device import Bytes, Device
from deploykit.trt.loaded import LoadedPlan

PROBE_RUNS = 20


class EngineSession:
    """A session on a plan, as `deploykit.session.Session` asks for; `split` adds where the time went."""

    def __init__(self, trt: Any, device: Device, engine: Artifact, request: OpenRequest, where: str) -> None:
        self.signature: Signature = engine.signature
        self.device = where
        self.threads = 1  # one host thread enqueues; the work is the GPU's
        self._gpu = device
        self._inputs = [spec.name for spec in engine.signature.inputs]
        self._outputs = [spec.name for spec in engine.signature.outputs]
        self._own_buffers: tuple[dict[str, Bytes], dict[str, Bytes]] | None = None
        self._closed = False
        self._resources = ExitStack()
        shapes = engine.signature.shapes(request.batch, request.shapes)
        named = request.options.get("runtime_cache")
        self._plan = LoadedPlan(trt, device, engine.path, engine.signature, shapes, Path(str(named)) if named else None)
        self._resources.callback(self._plan.close)
        self._ports, self._stream = self._plan.ports, self._plan.stream
        try:
            self._events = []
            for _ in range(4):
                self._events.append(device.create_event())
                self._resources.callback(device.destroy_event, self._events[-1])
            self.precision, said = _actual(engine)
            self.notes: tuple[str, ...] = (*self._plan.notes, *said, *self._probe())
        except BaseException:
            self.close()
            raise

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """A call that copies these inputs in, runs, copies the outputs out and waits: host in, host out.

        The inputs are put into pinned memory here, once, as an application would receive them there.
        """
        sources, targets = self._pin(feeds)

        def run() -> object:
            self._transfer_in(sources)
            self._plan.compute()
            self._transfer_out(targets)
            self._gpu.synchronize(self._stream)
            return targets

        return run

    def infer(self, feeds: Feeds) -> Outputs:
        """Finished outputs on the host, in arrays of their own."""
        sources, targets = self._desk(feeds)
        self._transfer_in(sources)
        self._plan.compute()
        self._transfer_out(targets)
        self._gpu.synchronize(self._stream)
        return {
            spec.name: self._view(spec.name, targets[spec.name]).astype(np.dtype(spec.dtype)) for spec in self.signature.outputs
        }

    def split(self, feeds: Feeds, runs: int = PROBE_RUNS) -> tuple[timing.Split, ...]:
        """Where the time of `runs` runs went: events around H2D, compute and D2H, the host's clock around the enqueue."""
        sources, targets = self._desk(feeds)
        gpu, stream, found = self._gpu, self._stream, []
        for _ in range(runs):
            gpu.record(self._events[0], stream)
            self._transfer_in(sources)
            gpu.record(self._events[1], stream)
            start = time.perf_counter()
            self._plan.compute()
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

    def _probe(self) -> tuple[str, ...]:
        """Notes from a few runs on random inputs (zeros for integers, which may be indices)."""
        rng = np.random.default_rng(0)
        feeds = {}
        for spec in self.signature.inputs:
            shape, dtype = self._ports[spec.name].shape, np.dtype(spec.dtype)
            floats = np.issubdtype(dtype, np.floating)
            feeds[spec.name] = rng.standard_normal(shape).astype(dtype) if floats else np.zeros(shape, dtype)
        middle = timing.median(self.split(feeds))
        return (timing.words(middle), timing.TIMED, *timing.warnings(middle, captured=self._plan.captured))

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
            view = self._view(name, memory)
            if np.issubdtype(view.dtype, np.integer) and view.dtype.itemsize < feeds[name].dtype.itemsize:
                _require_range(name, feeds[name], np.iinfo(view.dtype))
            view[...] = feeds[name]

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


def _require_range(name: str, values: NDArray[Any], held: np.iinfo[Any]) -> None:
    """Raises InputError for integers that the engine's type cannot hold: TensorRT 8.6 takes int64 inputs as int32."""
    if values.size and (values.min() < held.min or values.max() > held.max):
        raise InputError(
            f"input '{name}' has values from {values.min()} to {values.max()}, and this engine takes it as {held.dtype}",
            "build it with TensorRT 10 or later, which has int64",
        )


def _actual(engine: Artifact) -> tuple[str, tuple[str, ...]]:
    """The precision an engine really runs in, by the layers its manifest lists, and what to say where it differs."""
    if engine.precision not in ("int8", "mixed"):
        return engine.precision, ()
    fallback = engine.facts.get("fallback") or []
    asked = sum(row.get("Int8", 0) for row in (engine.facts.get("requested") or {}).values())
    if not fallback:
        return engine.precision, ()
    kinds = sorted({str(row["actual"]) for row in fallback})
    note = f"{len(fallback)} of {asked} layers that asked for INT8 run in {' and '.join(kinds)}"
    convolutions = (engine.facts.get("layers") or {}).get("convolution", {})
    none_left = len(fallback) >= asked or (convolutions and "Int8" not in convolutions)
    return (("fp32" if kinds == ["Float"] else "fp16") if none_left else engine.precision), (note,)
