"""One engine of a SOURCE: what `build` does where it is given no .onnx file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from deploykit import children, data
from deploykit.artifact import Artifact
from deploykit.errors import InputError
from deploykit.pipeline import building, prepare
from deploykit.pipeline.building import Extras
from deploykit.pipeline.delivered import scratch_beside
from deploykit.pipeline.limited import Limits
from deploykit.pipeline.request import DataRequest, Narrator, SourceRequest
from deploykit.pipeline.single import ModelFile, open_data
from deploykit.pipeline.workshop import STAGE_TIMEOUT_S
from deploykit.samples import Samples
from deploykit.session import BuildRequest
from deploykit.signature import ShapeRange
from deploykit.source_spec import parse as parse_source


def build(
    source: SourceRequest,
    backend_name: str,
    wanted: BuildRequest,
    out: Path,
    request: DataRequest,
    narrator: Narrator,
    limits: Limits | None = None,
) -> Artifact:
    """One engine in the folder `out`, with its manifest: of an .onnx file as it is, of another source exported first, which also
    proves its signature to a backend that makes its graph of the PyTorch module itself.

    Raises what the export, the data and the backend raise; InputError for --calib where the backend quantizes by itself.
    """
    spec = parse_source(source.text, weights=source.weights, num_classes=source.num_classes, inputs=source.inputs)
    if spec.kind == "onnx":
        assert spec.file is not None
        return building.build_file(spec.file, backend_name, wanted, out, request, narrator, limits)
    kind = building.kind_of(backend_name, wanted)
    if kind == "source-calibrated":
        _require_samples(backend_name, request)
    with scratch_beside(out / "engine") as folder:
        narrator.step(f"export {spec.name}")
        exported = folder / f"{spec.name}.onnx"
        proof = prepare.proof_batches(wanted.batches)
        made: Artifact = children.run(
            *("export", prepare.to_onnx, spec, exported, proof, source.opset, source.outputs),
            timeout_s=STAGE_TIMEOUT_S,
            progress=narrator.progress,
        )
        model = made.save()
        if not kind.startswith("source"):
            return building.build_file(exported, backend_name, wanted, out, request, narrator, limits)
        from deploykit.stages import export

        graph = export.source_artifact(spec, folder / "source.json", model).save()
        if kind == "source-calibrated":
            wanted = replace(wanted, calibration=_samples(model, request, wanted.shapes))
        extras = Extras(limits=limits)
        return building.build_engine(graph, Path(spec.name), backend_name, wanted, out, folder, narrator, extras)


def _require_samples(backend_name: str, request: DataRequest) -> None:
    if request.calib_table is not None:
        raise InputError(
            f"{backend_name} quantizes its own graph and finds its own ranges, so a table (--calib) is of no use to it",
            "give the samples: --data DATA",
        )
    if request.data is None:
        raise InputError("static INT8 needs samples to calibrate with, and there are none", "add --data DATA")


def _samples(model: Artifact, request: DataRequest, shapes: Mapping[str, ShapeRange]) -> Samples:
    assert request.data is not None
    names = model.facts.get("classes")
    known = ModelFile(model, "", tuple(names) if names else None)
    return data.calibration_share(open_data(known, request.data, request, shapes), request.calib_n)
