"""Engines as targets, and what the graphs of engines that cannot run here are expected to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deploykit import artifact as artifacts
from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.errors import DeploykitError, InputError
from deploykit.pipeline.measuring import Entry
from deploykit.pipeline.plan import PlannedRow
from deploykit.pipeline.workshop import Workshop

_MANIFEST = ".manifest.json"


def find(path: Path) -> list[Artifact]:
    """The engine at `path`, or all those in the folder `path` and below; empty when it is neither.

    A plain .onnx file with no manifest, or one that is no engine, is a source, not an engine.
    """
    if path.is_dir():
        sides = sorted(path.rglob(f"*{_MANIFEST}"))
        loaded = [artifacts.load(side) for side in sides]
        return [a for a in loaded if "backend" in a.options and a.stage == "engine"]
    if path.is_file() and path.with_name(path.name + _MANIFEST).is_file():
        found = artifacts.load(path)
        return [found] if found.stage == "engine" and "backend" in found.options else []
    if path.is_file() and path.suffix in (".engine", ".plan", ".xml"):
        raise InputError(
            f"{path} has no manifest ({path.name}{_MANIFEST})",
            "build it with deploykit build or build-trt, or give the .onnx file",
        )
    return []


def predictions(
    shop: Workshop, rows: Sequence[PlannedRow], built: Mapping[tuple[str, str, str, str], Artifact | DeploykitError]
) -> list[Entry]:
    """For each engine that cannot run here, its graph as an entry for ONNX Runtime on the CPU, Q/DQ taken literally:
    what accuracy the graph has can be measured anywhere. The figure is a prediction for the engine, and is called one."""
    if backends.get("onnxruntime").missing() is not None:
        return []
    found: list[Entry] = []
    for key in dict.fromkeys(row.engine_key for row in rows if not row.skip and not row.runnable):
        row = next(r for r in rows if r.engine_key == key)
        kind = backends.get(row.backend).graph(row.precision)
        graph = shop.graphs.get(kind)
        if graph is None or not isinstance(built.get(key), Artifact):
            continue
        stand_in = replace(row, backend="onnxruntime", batch=0, name=f"{row.name} {row.backend}", reference=False)
        found.append(Entry(stand_in, graph, {"literal_qdq": True}))
    return found


def prediction_key(row: PlannedRow) -> PlannedRow:
    """The stand-in row under which the prediction for `row` is kept."""
    return replace(row, backend="onnxruntime", batch=0, name=f"{row.name} {row.backend}", reference=False)
