"""ONNX Runtime's own profile of a model, in KernelProfile's words."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploykit import graph
from deploykit.artifact import Artifact
from deploykit.backends import onnx_runtime, opened
from deploykit.errors import BackendFailed
from deploykit.kernel_profile import Kernel, KernelProfile, per_run
from deploykit.session import OpenRequest
from deploykit.signature import Feeds

WARMUP_RUNS = 3
LEAST_RUNS, MOST_RUNS, LONG_ENOUGH_S = 10, 200, 3.0
_QUANTIZE = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_REFORMAT = {"ReorderInput", "ReorderOutput", "Cast"}
_INTEGER_TYPES = {"uint8", "int8", "uint16", "int16", "int32"}
_SUFFIX = "_kernel_time"


def profile(engine: Artifact, request: OpenRequest, pool: Sequence[Feeds]) -> KernelProfile:
    """The kernels of an .onnx file at one batch, from `enable_profiling`: some warm-up runs, then at least 10 runs and 3 s.

    Raises ModelError, BackendFailed and InputError as the backend's `open` does.
    """
    opened.require_batch(engine.signature, request)
    sizes = {engine.signature.batch_symbol: request.batch} if engine.signature.batch_symbol else {}
    names = {name for node in graph.load(engine.path).graph.node for name in (node.name, *node.output) if name}
    with tempfile.TemporaryDirectory(prefix="deploykit-profile-") as folder:
        prefix = str(Path(folder) / "profile")
        session = onnx_runtime.create(engine.path, request.threads, {}, sizes, profile_prefix=prefix)
        feeds = [opened.ready(engine.signature, request, found) for found in pool]
        walls: list[float] = []
        start = time.perf_counter()
        for number in range(WARMUP_RUNS + MOST_RUNS):
            before = time.perf_counter()
            try:
                session.run(None, feeds[number % len(feeds)])
            except Exception as exc:
                raise BackendFailed(f"ONNX Runtime failed while running: {opened.first_line(exc)}", "check the inputs") from exc
            walls.append(time.perf_counter() - before)
            if number + 1 >= WARMUP_RUNS + LEAST_RUNS and time.perf_counter() - start > LONG_ENOUGH_S:
                break
        events = json.loads(Path(session.end_profiling()).read_text())
    runs = len(walls) - WARMUP_RUNS
    kernels = _kernels(events, WARMUP_RUNS, runs, names)
    return KernelProfile("onnxruntime", kernels, statistics.median(walls[WARMUP_RUNS:]), runs, request.batch, request.threads)


def _kernels(events: list[dict[str, Any]], warm: int, runs: int, names: set[str]) -> tuple[Kernel, ...]:
    """One Kernel a node of the optimized graph, in the order of their first run."""
    ends = sorted(e["ts"] + e["dur"] for e in events if e.get("name") == "model_run")
    since = ends[warm - 1] if len(ends) >= warm else 0
    seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith(_SUFFIX) and event["ts"] >= since:
            seen[event["name"].removesuffix(_SUFFIX)].append(event)
    made = []
    for name, found in sorted(seen.items(), key=lambda item: int(item[1][0]["ts"])):
        arguments = found[0]["args"]
        op = str(arguments["op_name"])
        types = [next(iter(t), "") for t in arguments.get("input_type_shape", [])]
        results = [next(iter(t), "") for t in arguments.get("output_type_shape", [])]
        seconds = per_run([float(e["dur"]) * 1e-6 for e in found], runs)
        source = _source(name, names)
        kind = _kind(op, types, results, bool(source))
        made.append(Kernel(name, op, kind, _precision(kind, types), seconds, "", (source,) if source else ()))
    return tuple(made)


def _source(name: str, names: set[str]) -> str:
    """The graph's node (or its result, where nodes have no names) that a kernel is named after, `conv_token_7` or
    `relu_nchwc`; '' where there is none."""
    while name not in names:
        cut = max(name.rfind(mark) for mark in ("_token_", "_nchwc"))
        if cut <= 0:
            return ""
        name = name[:cut]
    return name


def _kind(op: str, types: list[str], results: list[str], in_graph: bool) -> str:
    if op in onnx_runtime.INTEGER_OPS:
        return "integer"
    if op in onnx_runtime.FLOAT_OPS:
        return "float"
    if op in _QUANTIZE:
        return "quantize"
    if op in _REFORMAT or (op == "Transpose" and not in_graph):
        return "reformat"
    narrow = (types[:1] and types[0] in _INTEGER_TYPES) or op.startswith("QLinear")
    return "other-integer" if narrow and (not results or results[0] != "float") else "other-float"


def _precision(kind: str, types: list[str]) -> str:
    if kind in ("integer", "other-integer"):
        return "int8"
    return types[0] if types and kind in ("float", "other-float") else ""
