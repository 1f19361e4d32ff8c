"""ceilings: what this machine can do at most, measured: chains of 3x3 convolutions in each precision, and memory.

The best engine for it that is installed runs them, and the fastest run counts, as in STREAM: a ceiling is what the machine
can do when nothing is in its way. A run takes a millisecond or so, so that a busy machine still lets some through whole.
"""

from __future__ import annotations

import functools
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import backends, children, graph, machine
from deploykit.artifact import Artifact
from deploykit.errors import BackendFailed, DeploykitError
from deploykit.roofline import Ceilings
from deploykit.session import OpenRequest
from deploykit.signature import Signature

if TYPE_CHECKING:
    import onnx

ENGINES = ("openvino", "onnxruntime")  # the first that is here; on x86 its kernels (oneDNN) were the faster ones
SECONDS = 0.25  # for each chain, once it is open
TIMEOUT_S = 180.0
# (channels, height and width) of ResNet's layers; the fastest counts
CHAINS = ((64, 56), (128, 28), (512, 7))
RUN_S = 1e-3  # what a run should take: long against the call, short against a time slice of a busy machine
_MOST_LAYERS = 16
_BANDWIDTH_S = 0.12  # for each size of working set
_LAST_LEVEL_BYTES = 32 << 20  # where the system does not tell


def engine() -> str | None:
    """The backend that the ceilings are measured with here; None when none of them is installed."""
    return next((name for name in ENGINES if backends.get(name).missing() is None), None)


def measure(threads: int, progress: children.Progress | None = None) -> Ceilings:
    """The ceilings of this machine on so many threads; precisions that the engine lacks are left out.

    Raises BackendFailed when no engine that runs the chains is here, or none of them ran.
    """
    name = engine()
    if name is None:
        raise BackendFailed("no engine is here to measure the machine's ceilings with", "pip install 'deploykit[openvino]'")
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        found: Mapping[str, tuple[float, str]] = children.run(
            "ceilings", convolutions, name, threads, Path(folder), threads=threads, timeout_s=TIMEOUT_S, progress=progress
        )
    rates: Mapping[int, float] = children.run("memory bandwidth", memory, threads, threads=threads, timeout_s=TIMEOUT_S)
    return Ceilings(
        name=f"this machine on {threads} thread{'' if threads == 1 else 's'}",
        source="measured: the fastest run of a chain of 3x3 convolutions; the fastest copy or sum for memory",
        ops_per_s={precision: rate for precision, (rate, _) in found.items()},
        bytes_per_s=rates,
        how={precision: said for precision, (_, said) in found.items()},
    )


def convolutions(name: str, threads: int, folder: Path) -> dict[str, tuple[float, str]]:
    """Of each precision that the backend really runs here: operations a second of its fastest run, and of which chain.

    Runs in a child process. Raises BackendFailed when no chain ran.
    """
    backend = backends.get(name)
    wanted = [p for p in ("fp32", "bf16", "int8") if p in backend.precisions()]
    found: dict[str, tuple[float, str]] = {}
    problems: list[str] = []
    for number, precision in enumerate(wanted):
        layers = 1
        for turn, (channels, size) in enumerate((CHAINS[0], *CHAINS)):
            children.report_progress(f"ceilings: {precision}", (number + turn / (len(CHAINS) + 1)) / len(wanted))
            path = folder / f"{precision}-{turn}.onnx"
            graph.save(chain(channels, size, layers, integer=precision == "int8"), path)
            operations = 2 * 9 * channels * channels * size * size * layers
            try:
                seconds = _fastest(name, path, precision, threads, SECONDS if turn else SECONDS / 4)
            except DeploykitError as exc:
                problems.append(f"{precision}: {exc.message}")
                break
            if turn == 0:  # only to learn how many layers make a run of RUN_S
                layers = min(_MOST_LAYERS, max(1, round(RUN_S / seconds)))
            elif precision not in found or operations / seconds > found[precision][0]:
                said = f"{name}, {layers} convolutions 3x3 of {channels} channels at {size}x{size}"
                found[precision] = (operations / seconds, said)
    if not found:
        raise BackendFailed(f"no chain of convolutions ran on {name}: {'; '.join(problems)}")
    return found


def _fastest(name: str, path: Path, precision: str, threads: int, seconds: float) -> float:
    """Seconds of the fastest run. Raises BackendFailed where another precision ran than was asked for."""
    signature: Signature = graph.signature(graph.load(path))
    session = backends.get(name).open(
        Artifact(path, "onnx", precision, signature, "ceilings"), OpenRequest(precision, 1, threads)
    )
    try:
        if session.precision != precision:
            raise BackendFailed(f"{name} ran {session.precision} where {precision} was asked for")
        rng = np.random.default_rng(0)
        shapes = signature.shapes(1)
        run = session.bind({key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()})
        return _best(run, seconds)
    finally:
        session.close()


def _best(run: Callable[[], object], seconds: float) -> float:
    for _ in range(3):
        run()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        run()
        best = min(best, time.perf_counter() - start)
    return best


def chain(channels: int, size: int, layers: int, *, integer: bool) -> onnx.ModelProto:
    """A graph of 3x3 convolutions, each followed by a ReLU; `integer`: uint8 activations and int8 weights in Q/DQ form."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    stored: dict[str, np.ndarray[Any, Any]] = {}

    def pair(name: str) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_dq"]))
        return f"{name}_dq"

    if integer:
        stored |= {"scale": np.array(0.05, np.float32), "zero": np.array(0, np.uint8)}
        stored |= {"weight_scale": np.full(channels, 0.01, np.float32), "weight_zero": np.zeros(channels, np.int8)}
    last = pair("x") if integer else "x"
    for i in range(layers):
        weight = rng.normal(0, (2 / (9 * channels)) ** 0.5, (channels, channels, 3, 3))
        name = f"w{i}"
        if integer:
            stored[name] = np.clip(np.round(weight / 0.01), -127, 127).astype(np.int8)
            nodes.append(helper.make_node("DequantizeLinear", [name, "weight_scale", "weight_zero"], [f"{name}_dq"], axis=0))
            name = f"{name}_dq"
        else:
            stored[name] = weight.astype(np.float32)
        nodes.append(helper.make_node("Conv", [last, name], [f"c{i}"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        last = pair(f"r{i}") if integer else f"r{i}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"]))
    made = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels, 1, 1])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def memory(threads: int) -> dict[int, float]:
    """Bytes a second by the size of the working set, all threads together: the faster of a copy (counted as read and
    written) and a sum. Runs in a child process.

    The largest set is four times the last cache (STREAM's rule); the smaller ones may stay in a cache.
    """
    last = last_level_bytes()
    sizes = sorted({256 << 10, 1 << 20, 4 << 20, last // 2, 4 * last})
    limit = (machine.memory_bytes() or 4 << 30) // 8
    return {size: _bandwidth(size, threads) for size in sizes if size <= limit}


def _bandwidth(size: int, threads: int) -> float:
    each = max(size // threads // 16, 1)  # two buffers of 8-byte values a thread
    sources = [np.ones(each, np.uint64) for _ in range(threads)]
    targets = [np.zeros(each, np.uint64) for _ in range(threads)]
    kinds: Sequence[tuple[int, Callable[[int], object]]] = (
        (16, lambda i: np.copyto(targets[i], sources[i])),
        (16, lambda i: (np.bitwise_or.reduce(sources[i]), np.bitwise_or.reduce(targets[i]))),
    )
    return max(per_value * each * _rounds_per_s(call, threads) for per_value, call in kinds)


def _rounds_per_s(call: Callable[[int], object], threads: int) -> float:
    """Calls a second, summed over the threads, each at its fastest (numpy lets go of the interpreter's lock inside)."""
    fastest = [float("inf")] * threads

    def work(index: int) -> None:
        fastest[index] = _best(functools.partial(call, index), _BANDWIDTH_S / 2)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(1 / seconds for seconds in fastest)


def last_level_bytes() -> int:
    """Bytes of the last level of cache that the first CPU sees."""
    found = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        units = {"K": 1 << 10, "M": 1 << 20}
        if text and text[:-1].isdigit() and text[-1] in units:
            found.append(int(text[:-1]) * units[text[-1]])
    return max(found) or _LAST_LEVEL_BYTES


def versions() -> dict[str, str]:
    """What the ceilings depend on beside the machine: the engine's version and Python's architecture."""
    name = engine()
    return {"arch": platform.machine(), **(backends.get(name).versions() if name is not None else {})}
