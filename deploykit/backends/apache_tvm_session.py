"""An open TVM library: its virtual machine here, or on a board that runs TVM's RPC server."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import Artifact
from deploykit.backends import apache_tvm_compile as compiling
from deploykit.backends import opened
from deploykit.errors import BackendFailed, InputError
from deploykit.session import OpenRequest
from deploykit.signature import Feeds, Outputs, Signature


def open_here(engine: Artifact, request: OpenRequest) -> TvmSession:
    """A session in this process. The number of threads is the process's: the session opened last sets it.

    Raises InputError for a batch that was not built, BackendFailed for a file that TVM cannot load.
    """
    path, notes = library_for(engine, request.batch)
    threads = _use_threads(request.threads)
    import tvm

    machine = _machine_of(_loaded(path), tvm.cpu(), path.name)
    return TvmSession(machine, engine.signature, request, ("cpu", tvm.cpu()), threads, notes)


def open_there(engine: Artifact, request: OpenRequest, address: str) -> TvmSession:
    """A session on the board at `address` (HOST:PORT), whose RPC server gets the library; threads are the board's own.

    Times taken of it hold the network's share. Raises InputError, BackendFailed where nothing answers.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"'{address}' is no address of an RPC server", "give HOST:PORT, for example 192.168.1.20:9090")
    path, notes = library_for(engine, request.batch)
    _require_whole(path)
    from tvm import rpc

    try:
        remote = rpc.connect(host, int(port), session_timeout=600)
        remote.upload(str(path))
        library = remote.load_module(path.name)
    except (RuntimeError, OSError, ValueError) as exc:
        raise BackendFailed(
            f"TVM's RPC server at {address} did not take {path.name}: {compiling.why(exc)}",
            "start it on the board: python -m tvm.exec.rpc_server --host 0.0.0.0 --port PORT (docs/tvm-rpc.md)",
        ) from exc
    machine = _machine_of(library, remote.cpu(), path.name)
    where = f"{engine.device} at {address}"
    return TvmSession(machine, engine.signature, request, (where, remote.cpu()), request.threads, (*notes, "over RPC"))


def library_for(engine: Artifact, batch: int) -> tuple[Path, tuple[str, ...]]:
    """The library that runs a batch, and notes on it. Raises InputError where none was built for it."""
    exact = f"model-b{batch}.so"
    built = engine.facts.get("batches")
    if built and batch not in built:
        raise InputError(
            f"{engine.path.name} was built for batch {', '.join(map(str, built))}, not for {batch}",
            f"build it again with --batch {batch}",
        )
    if exact == engine.path.name or exact in engine.companions:
        return engine.path.with_name(exact), _of_a_search(engine.facts.get("tuning", {}).get(exact))
    if engine.facts.get("tuning"):
        return engine.path, (f"not tuned at batch {batch}: default schedules",)
    return engine.path, ("not tuned: default schedules",)


def _of_a_search(tuned: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What to say of a library that a search was made for; `tuned`: what it found."""
    if tuned is None:
        return ()
    taken = tuned.get("functions", {})
    if "searched_over_default" in tuned or not taken.get("searched", 0) + taken.get("untried", 0):
        return ("default schedules: the search found nothing faster",)
    return ("schedules found by tuning",)


def _use_threads(threads: int) -> int:
    """Sets how many threads TVM's pool uses in this process; returns what it says it uses.

    Left alone, the pool has one thread a physical core, half of what /proc/cpuinfo lists whether or not these are SMT
    siblings (`MaxConcurrency`), fixed when it is first used; and each is pinned to a core of its own.
    """
    allowed = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("TVM_NUM_THREADS", str(len(allowed)))
    compiling.import_without_torch()
    import tvm

    share_all = -3  # kSpecifyThreadShareAllCore: no thread is pinned to one core
    tvm.get_global_func("runtime.config_threadpool")(share_all, threads, [str(cpu) for cpu in allowed])
    return int(tvm.get_global_func("runtime.NumThreads")())


def _is_whole(path: Path) -> bool:
    """Whether the file is a 64-bit ELF file down to its section table, which stands at its end: the dynamic loader reads a
    truncated one through a memory map, and dies."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return False
    offset = int(struct.unpack_from("<Q", head, 40)[0])
    size, count = struct.unpack_from("<HH", head, 58)
    return offset > 0 and offset + size * count <= path.stat().st_size


def _require_whole(path: Path) -> None:
    if not _is_whole(path):
        raise BackendFailed(f"{path.name} is not a whole shared library", "build the engine again")


def _loaded(path: Path) -> Any:
    """TVM's module in a library. Raises BackendFailed for a file that is none, or another TVM's."""
    import tvm

    _require_whole(path)
    try:
        return tvm.runtime.load_module(str(path))
    except (RuntimeError, ValueError, OSError) as exc:
        raise BackendFailed(f"TVM cannot load {path.name}: {compiling.why(exc)}", "build the engine again") from exc


def _machine_of(library: Any, device: Any, name: str) -> Any:
    from tvm import relax

    try:
        return relax.VirtualMachine(library, device)
    except (RuntimeError, ValueError, AttributeError) as exc:
        raise BackendFailed(f"{name} holds no virtual machine of TVM's: {compiling.why(exc)}", "build the engine again") from exc


class TvmSession:
    """A loaded library and its virtual machine. `place`: the device's name, and TVM's handle of it."""

    def __init__(
        self,
        machine: Any,
        signature: Signature,
        request: OpenRequest,
        place: tuple[str, Any],
        threads: int,
        notes: tuple[str, ...],
    ) -> None:
        self._machine: Any | None = machine
        self._request = request
        self.signature = signature
        self.precision = "fp32"
        self.device, self._at = place
        self.threads = threads
        self.notes = notes

    def infer(self, feeds: Feeds) -> Outputs:
        """Outputs by name, copied out of the engine. Raises InputError for feeds that do not fit, BackendFailed."""
        values = self._run(self._tensors(feeds))
        return {spec.name: np.array(v.numpy()) for spec, v in zip(self.signature.outputs, values, strict=True)}

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """One run on inputs that lie in the device's memory; on this CPU its outputs lie in the host's when it returns."""
        tensors = self._tensors(feeds)
        return lambda: self._run(tensors)

    def close(self) -> None:
        """Frees the engine; a second time does nothing."""
        self._machine = None

    def _tensors(self, feeds: Feeds) -> list[Any]:
        import tvm

        if self._machine is None:
            raise BackendFailed("this TVM session is closed", "open the engine again")
        return [tvm.runtime.tensor(a, self._at) for a in opened.ready(self.signature, self._request, feeds).values()]

    def _run(self, tensors: list[Any]) -> list[Any]:
        if self._machine is None:
            raise BackendFailed("this TVM session is closed", "open the engine again")
        many = len(self.signature.outputs) > 1
        try:
            if self.device == "cpu":
                found = self._machine["main"](*tensors)
            else:  # a list of tensors does not cross TVM's RPC: outputs are fetched one by one
                self._machine.set_input("main", *tensors)
                self._machine.invoke_stateful("main")
                found = self._machine.get_outputs("main")
        except (RuntimeError, ValueError, TypeError) as exc:
            raise BackendFailed(f"TVM failed while running: {compiling.why(exc)}", "check the inputs' values and shapes") from exc
        return list(found) if many else [found]
