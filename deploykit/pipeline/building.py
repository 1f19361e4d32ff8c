"""One engine of an .onnx file: what `build` and `build-trt` do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from deploykit import backends, children
from deploykit.artifact import Artifact
from deploykit.calibration_table import CalibrationTable
from deploykit.errors import BackendFailed, InputError, MissingBackend
from deploykit.observation import INTEGER
from deploykit.pipeline import int8, prepare
from deploykit.pipeline.delivered import deliver_engine, scratch_beside
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.pipeline.request import DataRequest, Narrator
from deploykit.pipeline.single import ModelFile, open_model, table_and_recipe
from deploykit.pipeline.workshop import STAGE_TIMEOUT_S
from deploykit.session import BuildRequest
from deploykit.signature import ShapeRange


def build_file(
    path: Path,
    backend_name: str,
    wanted: BuildRequest,
    out: Path,
    request: DataRequest,
    narrator: Narrator,
    *,
    allow: bool = False,
    explain: Path | None = None,
) -> Artifact:
    """One engine of an .onnx file in the folder `out`, with its manifest; `allow` builds what the backend would not vouch for.

    `explain`: where to write the smallest part of the graph that still fails, when the build does.
    """
    backend = backends.get(backend_name)
    missing = backend.missing() or (None if allow else backend.unsupported(wanted.precision, wanted.target))
    if missing is not None:
        raise MissingBackend(f"{backend_name} {wanted.precision}: {missing.why}", missing.remedy)
    kind = "fp32" if wanted.options.get("calibration") else backend.graph(wanted.precision)  # implicit INT8: the float graph
    if kind.startswith("source"):
        raise InputError(
            f"{backend_name} runs PyTorch sources, not .onnx files", "give the source to `deploykit run` or `deploykit bench`"
        )
    model = open_model(path)
    with scratch_beside(out / "engine") as folder:
        graph = _graph(model, kind, folder / "graph.onnx", request, narrator, wanted.shapes)
        narrator.step(f"build {backend_name} {wanted.precision} {wanted.target}")
        start = time.perf_counter()
        target_folder = folder / "built"
        target_folder.mkdir()
        try:
            made: Artifact = children.run(
                f"build {backend_name}",
                prepare.build_engine,
                backend_name,
                graph,
                wanted,
                target_folder,
                timeout_s=STAGE_TIMEOUT_S,
                progress=narrator.progress,
            )
        except BackendFailed as exc:
            if explain is None:
                raise
            from deploykit.pipeline.explaining import explained

            narrator.step("explain: looking for the smallest part of the graph that still fails")
            raise explained(exc, backend_name, graph, wanted, explain) from exc
        options = {
            "backend": backend_name,
            "precision": wanted.precision,
            "target": wanted.target,
            "batches": list(wanted.batches),
            "model": path.stem,
        }
        made = replace(
            made,
            stage="engine",
            precision=wanted.precision,
            device=wanted.target,
            parent=graph.sha256,
            options={**made.options, **options},
            versions={**made.versions, **backend.versions()},
            facts={"build_s": time.perf_counter() - start, **made.facts},
        )
        name = f"{path.stem}-{backend_name}-{wanted.precision}" + ("" if wanted.target == "cpu" else f"-{wanted.target}")
        return deliver_engine(made, out / name)


def _graph(
    model: ModelFile, kind: str, out: Path, request: DataRequest, narrator: Narrator, shapes: Mapping[str, ShapeRange]
) -> Artifact:
    """The graph of that kind, made from the model file; the file itself where it has that precision already."""
    given = model.artifact
    quantized = kind == "mixed" or kind.startswith("int8")
    if kind == "fp32" or (quantized and children.run("read", _is_quantized, given.path)):
        return given
    if kind == "mixed":
        raise InputError(
            f"{given.path.name} is a float model, and mixed precision needs a search",
            "make the graph first: deploykit quantize MODEL --mode mixed --min-sqnr 25 --data DATA -o mixed.onnx",
        )
    table, recipe = None, Int8Recipe()
    if kind in ("int8-cpu", "int8-tensorrt"):
        table, recipe = table_and_recipe(model, given.path, request, narrator, shapes)
    made: Artifact = children.run(
        kind, _make_graph, given.path, kind, table, recipe, out, timeout_s=STAGE_TIMEOUT_S, progress=narrator.progress
    )
    return made.save()


def _is_quantized(path: Path) -> bool:
    from deploykit import graph

    return bool({node.op_type for node in graph.load(path).graph.node} & INTEGER)


def _make_graph(path: Path, kind: str, table: CalibrationTable | None, recipe: Int8Recipe, out: Path) -> Artifact:
    from deploykit.stages import precision

    makers: dict[str, Callable[[], Artifact]] = {
        "fp16": lambda: precision.to_fp16(path, out),
        "int8-dynamic": lambda: precision.to_int8_dynamic(path, out),
    }
    if kind in makers:
        return makers[kind]()
    assert table is not None
    layout, rest = ("cpu", "fp32") if kind == "int8-cpu" else ("tensorrt", "fp16")
    return int8.write(path, table, layout, rest, recipe, (), out)
