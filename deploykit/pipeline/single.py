"""One stage alone, on files: what `export`, `check` and `calibrate` do, and what `quantize` and the builds begin with.

Each takes a file (with its manifest, where there is one) and delivers a file with a manifest, whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploykit import artifact as artifacts
from deploykit import calibration_table, children, data, preprocess, trt_cache
from deploykit.artifact import Artifact, manifest_path
from deploykit.calibration_table import CalibrationTable
from deploykit.errors import InputError
from deploykit.pipeline import given, prepare, ranges
from deploykit.pipeline.delivered import deliver, scratch_beside
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.pipeline.request import DataRequest, Narrator, SourceRequest
from deploykit.pipeline.workshop import STAGE_TIMEOUT_S
from deploykit.samples import Samples
from deploykit.signature import ShapeRange, Signature
from deploykit.source_spec import parse as parse_source
from deploykit.verdict import Finding


def export_file(request: SourceRequest, out: Path, batches: Sequence[int], narrator: Narrator) -> Artifact:
    """The source as an ONNX file at `out`, proven at 1, 2, an odd size and the largest of `batches`."""
    needs_suffix(out, ".onnx")
    spec = parse_source(request.text, weights=request.weights, num_classes=request.num_classes, inputs=request.inputs)
    proof = prepare.proof_batches(tuple(batches))
    narrator.step(f"export {spec.name}")
    with scratch_beside(out) as folder:
        made: Artifact = children.run(
            "export",
            prepare.to_onnx,
            spec,
            folder / out.name,
            proof,
            request.opset,
            request.outputs,
            timeout_s=STAGE_TIMEOUT_S,
            progress=narrator.progress,
        )
        options = {"spec": spec.to_json(), "batches": list(proof), "opset": request.opset, "outputs": list(request.outputs or ())}
        return deliver(replace(made, options={**options, **made.options}, parent=spec.digest()), out)


def needs_suffix(out: Path, suffix: str) -> None:
    if out.suffix != suffix:
        raise InputError(f"-o {out} should end in {suffix}", f"example: -o {out.stem or 'model'}{suffix}")
    if out.is_dir():
        raise InputError(f"-o {out} is a folder", "name a file")


@dataclass(frozen=True)
class Checked:
    """What a graph was found to be."""

    findings: tuple[Finding, ...]
    summary: Mapping[str, Any]


def check_file(path: Path, targets: Sequence[str], narrator: Narrator) -> Checked:
    """The findings on an ONNX file and its summary. Raises ModelError for what is no ONNX file."""
    from deploykit.stages import checks

    narrator.step(f"check {path.name}")
    findings = children.run("check", checks.find, path, tuple(targets), timeout_s=STAGE_TIMEOUT_S, progress=narrator.progress)
    summary = children.run("check", checks.summary, path, timeout_s=STAGE_TIMEOUT_S)
    return Checked(tuple(findings), prepare.summary_json(summary))


def repair_file(path: Path, out: Path, narrator: Narrator) -> tuple[str, ...]:
    """The model with what can be mended mended, at `out`; a line for each repair, and no file where there was none to make."""
    needs_suffix(out, ".onnx")
    if out.resolve() == path.resolve():
        raise InputError(
            f"--repair {out} is the model itself, which would be lost", f"example: --repair {out.stem}-repaired.onnx"
        )
    model = open_model(path)
    narrator.step(f"repair {path.name}")
    with scratch_beside(out) as folder:
        done, companions = children.run("repair", _repair, path, folder / out.name, timeout_s=STAGE_TIMEOUT_S)
        if done:
            made = replace(
                model.artifact,
                path=folder / out.name,
                stage="repair",
                parent=model.artifact.sha256,
                facts={**model.artifact.facts, "repairs": list(done)},
                companions=dict.fromkeys(companions, ""),
            )
            deliver(made, out)
    return tuple(done)


def _repair(path: Path, out: Path) -> tuple[list[str], tuple[str, ...]]:
    """The repairs made, and the names of the companions of the file at `out`; runs in a child process."""
    from deploykit import graph
    from deploykit.stages import checks

    mended, done = checks.repair(graph.load(path))
    return done, graph.save(mended, out) if done else ()


@dataclass(frozen=True)
class ModelFile:
    """An .onnx file as a stage takes it: with what its manifest knows, its digest, and the class names there."""

    artifact: Artifact
    digest: str
    classes: tuple[str, ...] | None


def open_model(path: Path, run: Callable[..., Any] = children.run) -> ModelFile:
    """The model file at `path`, with what its manifest knows, where it has one; `run` runs a function in a child process."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, not an .onnx file")
    signature, digest = run("read", _read_model, path)
    if manifest_path(path).is_file():
        known = artifacts.load(path)
        facts = known.facts
        classes = tuple(facts["classes"]) if facts.get("classes") else None
        return ModelFile(known, digest, classes)
    bare = Artifact(path, "onnx", "fp32", signature, "given", sha256=artifacts.sha256_of(path))
    return ModelFile(bare, digest, None)


def _read_model(path: Path) -> tuple[Signature, str]:
    from deploykit import graph

    model = graph.load(path)
    return graph.signature(model), graph.digest(model)


def open_data(model: ModelFile, spec: str, request: DataRequest, shapes: Mapping[str, ShapeRange]) -> Samples:
    """The samples of DATA for that model, with --preprocess and --classes, or its manifest's own."""
    from deploykit.pipeline.shares import class_names

    own = preprocess.chosen(request.preprocess, model.artifact.facts.get("preprocess"))
    classes = class_names(request.classes) or model.classes
    return data.open(spec, model.artifact.signature, preprocess=own, classes=classes, limit=request.limit, shapes=shapes)


@dataclass(frozen=True)
class CacheFiles:
    """The other forms in which a calibration table is written too: TensorRT's text cache, for the TensorRT that will read it,
    and the table of ONNX Runtime's TensorRT provider."""

    trt: Path | None = None
    trt_version: str | None = None
    onnxruntime: Path | None = None

    def write(self, table: CalibrationTable) -> None:
        """Writes those that were asked for."""
        if self.trt is not None:
            trt_cache.write(table, self.trt, version=self.trt_version or trt_cache.DEFAULT_VERSION)
        if self.onnxruntime is not None:
            data: bytes = children.run("table", trt_cache.to_onnxruntime, table)
            artifacts.write_atomically(self.onnxruntime, data)

    def check(self) -> None:
        """Raises InputError for a version that is none, or has no cache, before anything is spent."""
        if self.trt_version is None:
            return
        if self.trt is None:
            raise InputError(
                "--trt-version is the TensorRT that will read --trt-cache, and none is written", "add --trt-cache FILE"
            )
        trt_cache.version_number(self.trt_version)


def calibrate_file(
    path: Path,
    request: DataRequest,
    out: Path,
    caches: CacheFiles | None,
    narrator: Narrator,
    shapes: Mapping[str, ShapeRange],
) -> CalibrationTable:
    """The calibration table of a model over DATA, written to `out` (and in the other forms asked for); a pass over the same
    samples that was killed goes on where it stopped, from the file beside it that ends in .progress."""
    caches = caches or CacheFiles()
    caches.check()
    model = open_model(path)
    if request.data is None:
        raise InputError("calibration needs samples", "add --data DATA")
    samples = open_data(model, request.data, request, shapes)
    chosen = data.calibration_share(samples, request.calib_n)
    if out.is_file() and not request.recalibrate:
        kept = calibration_table.load(out)
        method = kept.method if ranges.made_by(kept, request.method) else request.method
        kept.require_match(model_sha256=model.digest, samples_digest=chosen.digest, method=method)
        table = kept
    else:
        narrator.step(f"calibrate {path.name} on {len(chosen)} samples, {request.method}")
        table = children.run(
            "calibrate",
            ranges.collect,
            path,
            chosen,
            request.method,
            out.with_name(out.name + ".progress"),
            timeout_s=STAGE_TIMEOUT_S,
            progress=narrator.progress,
        )
        table.save(out)
    caches.write(table)
    return table


def table_and_recipe(
    model: ModelFile,
    path: Path,
    request: DataRequest,
    narrator: Narrator,
    shapes: Mapping[str, ShapeRange],
    run: Callable[..., Any] = children.run,
) -> tuple[CalibrationTable, Int8Recipe]:
    """The ranges, given or made, and what else INT8 is made with: DATA, where given, corrects it too."""
    chosen = None
    if request.data is not None:
        chosen = data.calibration_share(open_data(model, request.data, request, shapes), request.calib_n)
    recipe = Int8Recipe(request.int8, chosen)
    return make_table(model, path, request, chosen, narrator, run), recipe


def make_table(
    model: ModelFile,
    path: Path,
    request: DataRequest,
    chosen: Samples | None,
    narrator: Narrator,
    run: Callable[..., Any] = children.run,
) -> CalibrationTable:
    """The calibration table that was given, or one made on these samples."""
    if request.calib_table is not None:
        return given.table(request.calib_table, path, model.digest)
    if chosen is None:
        raise InputError("static INT8 needs ranges", "add --calib calib.json (from `deploykit calibrate`), or --data DATA")
    narrator.step(f"calibrate {path.name} on {len(chosen)} samples, {request.method}")
    made: CalibrationTable = run(
        "calibrate", ranges.collect, path, chosen, request.method, timeout_s=STAGE_TIMEOUT_S, progress=narrator.progress
    )
    return made


def proof_lines(made: Artifact) -> list[str]:
    """What an export has proven, in words."""
    proof = made.facts.get("proof") or {}
    runs = proof.get("runs") or []
    lines = []
    if runs:
        batches = ", ".join(str(run["batch"]) for run in runs)
        errors = [o.get("max_abs_error", 0.0) for run in runs for o in run.get("outputs", {}).values()]
        compared = f": largest error {max(errors):.2g} ({proof.get('tolerance', '')})" if errors else ""
        lines.append(f"{'proven' if errors else 'runs'} at batch {batches}, against {proof.get('against', '?')}{compared}")
    return [*lines, *fact_lines(made)]


def fact_lines(made: Artifact) -> list[str]:
    """The notes and warnings an artifact carries."""
    from deploykit.pipeline import mixed

    found = mixed.lines(made) if "mixed" in made.facts else []
    level: Any = made.facts.get("equalized")
    if level is not None:
        found.insert(
            0, f"equalized: {level['equalized_groups']} groups of channels, the largest factor {level['largest_factor']:.1f}"
        )
    return [*found, *(f"note: {note}" for note in made.facts.get("notes", []))]


def budget_met(made: Artifact) -> bool:
    """Whether a mixed graph meets its budget; True for any other."""
    search: Any = made.facts.get("mixed")
    return search is None or bool(search["met"])


def summary_line(path: Path, found: Checked) -> str:
    """The graph in one line."""
    s = found.summary
    macs = s.get("macs")
    work = f"{macs / 1e6:.0f} M multiply-accumulates a sample" if macs else "operations unknown"
    return f"{path}: opset {s.get('opset')}, {s.get('parameters', 0) / 1e6:.2f} M parameters, {s.get('size_bytes', 0) / 1e6:.1f} MB, {work}"
