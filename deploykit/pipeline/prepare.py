"""Everything before an engine is measured: source -> graph -> findings -> calibration -> precision -> engine.

Each step is one stage run in a child process, kept in the store under a key of all that went in, so that a second run
makes again only what has changed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit import artifact as artifacts
from deploykit import backends, calibration_table
from deploykit.artifact import Artifact
from deploykit.errors import (
    BackendFailed,
    ChecksFailed,
    DataError,
    InputError,
    NotForThisGraph,
    OutOfSpace,
    StaleCalibration,
    UnknownName,
)
from deploykit.pipeline import given, int8, mixed, ranges
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.pipeline.mixed import Aim, Task
from deploykit.pipeline.request import DataRequest, Narrator, SourceRequest
from deploykit.pipeline.workshop import Workshop, backend_code, stage_files
from deploykit.samples import Samples
from deploykit.session import BuildRequest
from deploykit.signature import ShapeRange, Signature
from deploykit.source_spec import SourceSpec, changed_files
from deploykit.source_spec import parse as parse_source
from deploykit.stages.checks.summary import GraphSummary
from deploykit.store import Store
from deploykit.verdict import Finding

_FULL_BYTES = 64 << 10


def proof_batches(batches: tuple[int, ...]) -> tuple[int, ...]:
    """The batch sizes an export is proven at: 1, 2, an odd one and the largest."""
    return tuple(sorted({1, 2, 7, max(batches)}))


def open_source(request: SourceRequest, store: Store, narrator: Narrator, *, batches: tuple[int, ...]) -> Workshop:
    """The workshop of a model, exported to ONNX (or its .onnx adopted) and proven. Raises what export raises."""
    spec = parse_source(request.text, weights=request.weights, num_classes=request.num_classes, inputs=request.inputs)
    shop = Workshop(store, narrator, spec, model=_NOTHING, source=None)
    proof = proof_batches(batches)
    options = {"spec": spec.to_json(), "batches": list(proof), "opset": request.opset, "outputs": list(request.outputs or ())}

    def build(folder: Path) -> Artifact:
        made: Artifact = shop.child("export", to_onnx, spec, folder / "model.onnx", proof, request.opset, request.outputs)
        return made

    digest = spec.digest()
    model = shop.keep("export", "export", digest, options, build)
    if changed_files(spec, model.facts.get("local_files", {})):
        model = shop.keep("export", "export", digest, options, build, fresh=True)
    shop.model = model
    shop.graphs["fp32"] = model
    if spec.kind != "onnx":
        from deploykit.stages import export

        local = dict(model.facts.get("local_files", {}))
        shop.source = shop.keep(
            "source",
            "source",
            digest,
            {"spec": spec.to_json(), "local_files": local},
            lambda folder: export.source_artifact(spec, folder / "source.json", model),
        )
    return shop


def to_onnx(
    spec: SourceSpec, path: Path, batches: tuple[int, ...], opset: int | None, outputs: tuple[str, ...] | None
) -> Artifact:
    """The export stage; runs in a child process."""
    from deploykit.stages import export

    return export.to_onnx(spec, path, batches=batches, opset=opset, outputs=outputs)


def summary_json(summary: GraphSummary) -> dict[str, Any]:
    """The summary as JSON values."""
    return {**dataclasses.asdict(summary), "signature": summary.signature.to_json()}


def check(shop: Workshop, targets: tuple[str, ...], shapes: Mapping[str, ShapeRange] | None = None) -> None:
    """Fills in the findings and the summary of the FP32 graph; `targets` of which no rules are known are left out."""
    from deploykit.stages import checks

    targets = tuple(target for target in targets if target in checks.RULED)
    ranges = dict(shapes or {})

    def build(folder: Path) -> Artifact:
        findings = shop.child("check", find_findings, shop.model.path, targets, ranges)
        summary = shop.child("check", summarize, shop.model.path, ranges)
        doc = {"findings": [f.to_json() for f in findings], "summary": summary_json(summary)}
        (folder / "findings.json").write_text(json.dumps(doc, indent=1))
        return replace(
            shop.model,
            path=folder / "findings.json",
            format="findings",
            stage="check",
            parent=shop.model.sha256,
            facts={},
            companions={},
        )

    options = {"targets": sorted(targets), "shapes": shapes_json(ranges)}
    made = shop.keep("check", "check", shop.model.sha256, options, build)
    doc = json.loads(made.path.read_text())
    shop.findings = tuple(Finding(**f) for f in doc["findings"])
    shop.summary = doc["summary"]


def find_findings(path: Path, targets: tuple[str, ...], shapes: Mapping[str, ShapeRange]) -> list[Finding]:
    """The check stage; runs in a child process."""
    from deploykit.stages import checks

    return checks.find(path, targets, shapes=shapes)


def summarize(path: Path, shapes: Mapping[str, ShapeRange]) -> GraphSummary:
    """The graph's summary; runs in a child process."""
    from deploykit.stages import checks

    return checks.summary(path, shapes=shapes)


def shapes_json(shapes: Mapping[str, ShapeRange]) -> dict[str, list[list[int]]]:
    """The ranges as JSON values."""
    return {name: [list(r.min), list(r.opt), list(r.max)] for name, r in shapes.items()}


def lint(shop: Workshop, graph: Artifact, kind: str, target: str) -> None:
    """Adds to the findings what the target's rules say of the graph that was quantized for it. Raises ChecksFailed for an error."""
    from deploykit.stages import checks

    def build(folder: Path) -> Artifact:
        findings = shop.child("check", checks.lint, graph.path, target)
        (folder / "findings.json").write_text(json.dumps([f.to_json() for f in findings], indent=1))
        return replace(graph, path=folder / "findings.json", format="findings", stage="check", facts={}, companions={})

    made = shop.keep("check", f"check {kind} {target}", graph.sha256, {"target": target}, build)
    findings = [Finding(**f) for f in json.loads(made.path.read_text())]
    shop.findings += tuple(replace(f, message=f"in the {kind} graph: {f.message}") for f in findings)
    for finding in findings:
        if finding.severity == "error":
            raise ChecksFailed(f"{finding.code} in the {kind} graph: {finding.message}", finding.remedy)


def calibrate(shop: Workshop, samples: Samples, request: DataRequest) -> Artifact:
    """The calibration table's artifact: the one given, or made from `samples` (kept by fingerprint)."""
    method = request.method
    if method in shop.tables:
        return shop.tables[method]

    def build(folder: Path) -> Artifact:
        kept = shop.store.root / f".calibration-{shop.model.sha256[:12]}-{samples.digest[:12]}.npz"
        table = shop.child("calibrate", ranges.collect, shop.model.path, samples, method, kept)
        table.save(folder / "calib.json")
        return replace(
            shop.model,
            path=folder / "calib.json",
            format="calibration",
            stage="calibrate",
            parent=shop.model.sha256,
            facts={"samples": samples.describe(), "method": method},
            companions={},
        )

    options = {"method": method, "samples": samples.digest, "n": len(samples)}
    code = stage_files("calibrate-best") if method == calibration_table.BEST else ()
    made = shop.keep("calibrate", f"calibrate {method}", shop.model.sha256, options, build, fresh=request.recalibrate, code=code)
    shop.tables[method] = made
    return made


def given_table(shop: Workshop, path: Path) -> Artifact:
    """The artifact of a calibration table that the user gave. Raises StaleCalibration when it is another model's."""

    def build(folder: Path) -> Artifact:
        given.table(path, shop.model.path, _digest(shop)).save(folder / "calib.json")
        return replace(
            shop.model,
            path=folder / "calib.json",
            format="calibration",
            stage="calibrate",
            parent=shop.model.sha256,
            facts={},
            companions={},
        )

    return shop.keep("calibrate", "calibration table", shop.model.sha256, {"table": artifacts.sha256_of(path)}, build)


def _digest(shop: Workshop) -> str:
    return str(shop.child("digest", _digest_of, shop.model.path))


def _digest_of(path: Path) -> str:
    from deploykit import graph

    return graph.digest(graph.load(path))


def graph_for(
    shop: Workshop, kind: str, table: Callable[[], Artifact], recipe: Int8Recipe | None = None, aim: Aim | None = None
) -> Artifact:
    """The graph of a kind: source | fp32 | fp16 | int8-cpu | int8-tensorrt | int8-dynamic | mixed (with `aim`). Raises NotForThisGraph where the
    model cannot have that precision, and what `table` and the precision stage raise for other reasons."""
    try:
        return _graph_for(shop, kind, table, recipe or Int8Recipe(), aim)
    except (DataError, OutOfSpace, StaleCalibration, UnknownName):
        raise  # the user's to mend: nothing that the graph is at fault for
    except InputError as exc:
        raise NotForThisGraph(exc.message, exc.remedy) from exc


def _graph_for(shop: Workshop, kind: str, table: Callable[[], Artifact], recipe: Int8Recipe, aim: Aim | None) -> Artifact:
    if kind.startswith("source"):
        if shop.source is None:
            raise InputError("this backend needs the PyTorch source", "give the source instead of an .onnx file")
        return shop.source
    if kind in shop.graphs:
        return shop.graphs[kind]
    path = shop.model.path
    parent = shop.model.sha256
    options: dict[str, Any] = {"kind": kind}
    if kind in ("fp16", "int8-dynamic", "int8-cpu", "int8-tensorrt"):
        loaded = None
        if kind in ("int8-cpu", "int8-tensorrt"):
            calibrated = table()
            options |= {"table": calibrated.sha256, "recipe": recipe.to_json()}
            loaded = calibration_table.load(calibrated.path)

        def make(folder: Path) -> Artifact:
            made: Artifact = shop.child(kind, int8.graph_of_kind, path, kind, loaded, recipe, folder / "model.onnx")
            return made
    elif kind == "mixed" and aim is not None:
        calibrated = table()
        task = Task(path, "cpu", calibration_table.load(calibrated.path), recipe, aim.budget, aim.tune)
        options |= {
            "table": calibrated.sha256,
            "recipe": recipe.to_json(),
            "budget": dataclasses.asdict(aim.budget),
            "tune": task.mark,
        }
        notes = shop.store.root / f".search-{task.mark[:20]}.json"

        def make(folder: Path) -> Artifact:
            scratch = folder / "search"
            scratch.mkdir()
            best = mixed.find(task, scratch, notes, shop.narrator, lambda _: None)
            for name in [best.path.name, *best.companions]:
                os.replace(best.path.parent / name, folder / name)
            shutil.rmtree(scratch)
            return replace(best, path=folder / best.path.name, parent=parent)
    else:
        raise InputError(f"there is no graph of kind '{kind}'")
    shop.graphs[kind] = shop.keep("precision", kind, parent, options, make)
    return shop.graphs[kind]


def engine(
    shop: Workshop,
    backend_name: str,
    precision: str,
    target: str,
    batches: tuple[int, ...],
    shapes: Mapping[str, ShapeRange],
    graph: Artifact,
    calibration: Samples | None = None,
) -> Artifact:
    """The engine of one (backend, precision, target), built in a child process; of the backend's FP32 engine where it makes it of
    that. `calibration`: the samples of a backend that quantizes by itself. Raises what the backend raises."""
    backend = backends.get(backend_name)
    request = BuildRequest(precision, target, batches, dict(shapes), calibration=calibration)
    options: dict[str, Any] = {
        "backend": backend_name,
        "precision": precision,
        "target": target,
        "batches": list(batches),
        "model": shop.name,
        "shapes": shapes_json(shapes),
    }
    if calibration is not None:
        options |= {"calibration": calibration.digest, "calibration_n": len(calibration)}
    what = f"{backend_name} {precision}" + ("" if target == "cpu" else f" {target}")

    def build(folder: Path) -> Artifact:
        base = graph
        if backends.from_fp32(backend_name, precision):
            base = engine(shop, backend_name, "fp32", target, batches, shapes, graph)
        start = time.perf_counter()
        made: Artifact = shop.child(f"build {what}", build_engine, backend_name, base, request, folder)
        kept = {k: shop.model.facts[k] for k in ("preprocess", "classes") if shop.model.facts.get(k)}  # for predict and package
        facts = {**kept, "build_s": time.perf_counter() - start, **made.facts}
        return replace(made, stage="engine", precision=precision, device=target, parent=graph.sha256, facts=facts)

    return shop.keep("engine", what, graph.sha256, options, build, versions=backend.versions(), code=backend_code(backend_name))


def build_engine(backend_name: str, graph: Artifact, request: BuildRequest, folder: Path) -> Artifact:
    """What the backend builds; runs in a child process. Native code rarely says that the disk is full: it is asked here."""
    graph = replace(graph, facts={k: v for k, v in graph.facts.items() if k != "build_s"})  # that is how long the graph took
    try:
        return backends.get(backend_name).build(graph, request, folder)
    except BackendFailed as exc:
        if shutil.disk_usage(folder).free < _FULL_BYTES:
            raise OutOfSpace(f"no space left on the disk of {folder.parent.parent}", "free some space") from exc
        raise


_NOTHING = Artifact(Path(), "none", "none", Signature((), ()), "none")
