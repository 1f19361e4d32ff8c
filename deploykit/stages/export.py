"""A source to ONNX with a dynamic batch axis, proven; runs in a child process.

Opset: DEFAULT_OPSET is the newest that carries torch's operators as single nodes (Gelu came with 20) and that every engine
here takes: ONNX Runtime 1.31, OpenVINO 2026.4 and TensorRT-RTX 1.7, whose Q/DQ rules were seen to hold for opset 10 to 21.
torch's exporter is written against 18 and converts upward.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import graph
from deploykit.artifact import Artifact, write_atomically
from deploykit.children import report_progress
from deploykit.errors import InputError, ModelError
from deploykit.signature import Signature
from deploykit.source_spec import SourceSpec
from deploykit.stages import export_graph, export_proof
from deploykit.stages.export_trace import trace
from deploykit.stages.source import Source, count_parameters, load

if TYPE_CHECKING:
    import onnx
    import torch

DEFAULT_OPSET = 20
OPSETS = (18, 19, 20, 21, 22, 23)
TENSORRT_NEWEST_OPSET = 21


def to_onnx(
    spec: SourceSpec,
    path: Path,
    *,
    batches: tuple[int, ...] = (1, 8, 32),
    opset: int | None = None,
    outputs: tuple[str, ...] | None = None,
) -> Artifact:
    """The source as an ONNX file at `path`, FP32, its manifest not yet saved.

    The batch is dynamic, proven at 1, 2, an odd size and each of `batches` against the source's outputs (facts['proof']).
    `outputs` ends the graph at those outputs, tensors or nodes. An .onnx is adopted: checked, cut, stripped of metadata,
    its batch as it is (facts['fixed_batch'] when it is a number); so is a .pt2 with a fixed batch.
    Raises ModelError (a batch that got baked in, with the line of the user's code), InputError, UnknownName. Nothing is
    written before the proof has passed.
    """
    if not batches or min(batches) < 1:
        raise InputError(f"--batch {','.join(map(str, batches))}: a batch is 1 or more", "example: --batch 1,8,32")
    if opset is not None and opset not in OPSETS:
        raise InputError(
            f"--opset {opset} cannot be exported", f"choose from {OPSETS[0]} to {OPSETS[-1]}; default {DEFAULT_OPSET}"
        )
    digest = spec.digest()
    if spec.kind == "onnx":
        model, facts = _adopt(spec, batches, opset, outputs)
        signature = graph.signature(model)
    else:
        source = load(spec)
        wanted = export_proof.wanted_batches(batches)
        report_progress("tracing", 0.1)
        program, wanted = trace(source, wanted, spec.name)
        report_progress("converting to ONNX", 0.3)
        model = _convert(program, source, opset or DEFAULT_OPSET)
        proof = export_proof.prove(_open(model, path), source, wanted)
        facts = _facts(source, proof)
        signature = _signature(model, source.signature)
        if outputs:
            export_graph.cut(model, outputs)
            signature = _signature(model, replace(source.signature, outputs=()))
            facts["cut"] = list(outputs)
            facts["proof_after_cut"] = export_proof.prove_runs(_open(model, path), signature, wanted)
    facts |= {"opset": _opset(model), "source": digest, "params": facts.get("params", export_graph.count_weights(model))}
    if facts["opset"] > TENSORRT_NEWEST_OPSET:
        facts["notes"].append(f"opset {facts['opset']} is newer than TensorRT-RTX 1.7 was seen to take ({TENSORRT_NEWEST_OPSET})")
    facts["fixed_batch"] = signature.fixed_batch
    path.parent.mkdir(parents=True, exist_ok=True)
    companions = graph.save(model, path)
    report_progress("exported", 1.0)
    return Artifact(
        path=path,
        format="onnx",
        precision="fp32",
        signature=signature,
        stage="export",
        parent=digest,
        options={"batches": list(batches), "opset": opset, "outputs": list(outputs) if outputs else None, **_told(spec)},
        versions=_versions(spec),
        facts=facts,
        companions=dict.fromkeys(companions, ""),
    )


def source_artifact(spec: SourceSpec, path: Path, exported: Artifact | None = None) -> Artifact:
    """The source itself as an artifact (format 'source'): the spec's JSON, which SourceSpec.from_json and `source.load` open,
    with the digest it had; its manifest not yet saved.

    `exported`: its ONNX export, whose signature and facts are taken over; without it the source is loaded (torch).
    """
    digest = spec.digest()
    if exported is not None and exported.parent != digest:
        raise InputError(f"{spec.name} has changed since {exported.path.name} was exported from it", "export it again")
    if exported is None:
        source = load(spec)
        signature, facts = source.signature, _facts(source, None)
    else:
        signature, facts = exported.signature, dict(exported.facts)
    doc = spec.to_json() | {"digest": digest, "local_files": facts["local_files"]}
    write_atomically(path, json.dumps(doc, indent=1, sort_keys=True).encode())
    return Artifact(
        path=path,
        format="source",
        precision="fp32",
        signature=signature,
        stage="export",
        parent=digest,
        options=_told(spec),
        versions=spec.versions(),
        facts=facts | {"source": digest, "fixed_batch": signature.fixed_batch},
    )


def open_source(path: Path) -> Source:
    """The source that `source_artifact` described, loaded. Raises InputError when the file is no such description, or when
    the model's files, options or packages are no longer those it was made from."""
    from deploykit.source_spec import changed_files

    try:
        doc = json.loads(path.read_text())
        digest, local = doc["digest"], doc["local_files"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InputError(f"{path} is not the description of a source ({type(exc).__name__}: {exc})", "export again") from exc
    spec = SourceSpec.from_json(doc)
    changed = changed_files(spec, local)
    if changed or spec.digest() != digest:
        what = ", ".join(changed) or "its file, its weights or a package's version"
        raise InputError(f"{spec.name} has changed since it was exported: {what}", "export it again")
    return load(spec)


def _told(spec: SourceSpec) -> dict[str, Any]:
    return {
        "source": spec.reference or spec.name,
        "weights": "file" if spec.checkpoint else spec.weights,
        "num_classes": spec.num_classes,
    }


def _versions(spec: SourceSpec) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = dict(spec.versions())
    for package in ("onnx", *(() if spec.kind == "onnx" else ("onnxscript",)), "onnxruntime", "onnxruntime-gpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _facts(source: Source, proof: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "proof": proof,
        "preprocess": source.preprocess.to_json() if source.preprocess else None,
        "classes": list(source.classes) if source.classes else None,
        "params": count_parameters(source.module),
        "local_files": dict(source.local_files),
        "notes": list(source.notes),
    }


def _convert(program: torch.export.ExportedProgram, source: Source, opset: int) -> onnx.ModelProto:
    import torch

    names = [spec.name for spec in source.signature.inputs]
    try:
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=[spec.name for spec in source.signature.outputs],
            optimize=True,
            verbose=False,
        )
        assert converted is not None
        model: onnx.ModelProto = converted.model_proto
    except Exception as exc:
        # torch.onnx raises many types here; the innermost cause names the operator.
        cause: BaseException = exc
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = " ".join(str(cause).split())[:300]
        raise ModelError(
            f"torch.onnx cannot convert the model: {type(cause).__name__}: {text}", "replace that operation in the model"
        ) from exc
    export_graph.name_dimensions(model, source.signature)
    export_graph.name_nodes(model)
    export_graph.fold_batchnorm(model)
    graph.strip_metadata(model)
    _check(model)
    return model


def _complete_outputs(model: onnx.ModelProto) -> None:
    """Gives outputs without a shape the inferred one: engines do not need it there, the standard and onnx.checker do."""
    import onnx

    if model.ByteSize() >= graph.MAX_INLINE_BYTES or all(v.type.tensor_type.HasField("shape") for v in model.graph.output):
        return
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.output}
    for value in model.graph.output:
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.CopyFrom(inferred[value.name])


def _check(model: onnx.ModelProto) -> None:
    import onnx

    if model.ByteSize() >= graph.MAX_INLINE_BYTES:
        return  # protobuf's limit: checked by ONNX Runtime, which opens the file
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as exc:
        text = " ".join(str(exc).split())[:300]
        raise ModelError(f"the graph is not valid ONNX: {text}", "export it again with the tool that made it") from exc


def _open(model: onnx.ModelProto, path: Path) -> Any:
    if model.ByteSize() < graph.MAX_INLINE_BYTES:
        return export_proof.open_session(model.SerializeToString())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = type(model)()
        copy.CopyFrom(model)
        graph.save(copy, Path(folder) / "model.onnx")
        return export_proof.open_session(Path(folder) / "model.onnx")


def _opset(model: onnx.ModelProto) -> int:
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def _signature(model: onnx.ModelProto, source: Signature) -> Signature:
    """The graph's signature with the source's batch symbol; outputs whose axes only the source's runs know keep those."""
    found = graph.signature(model)
    return Signature(found.inputs, found.outputs, source.batch_symbol if found.batch_symbol else None)


def _adopt(
    spec: SourceSpec, batches: Sequence[int], opset: int | None, outputs: tuple[str, ...] | None
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    if opset is not None:
        raise InputError("--opset cannot change an .onnx file", "export it again from the model it came from")
    assert spec.file is not None
    model = graph.load(spec.file)
    _complete_outputs(model)
    _check(model)
    if outputs:
        export_graph.cut(model, outputs)
    graph.strip_metadata(model)
    signature = graph.signature(model)
    fixed = signature.fixed_batch
    wanted = (fixed,) if fixed is not None else tuple(sorted({1, 2, 3}))
    report_progress("running", 0.5)
    notes = []
    if fixed is not None:
        notes.append(f"the batch is baked into the graph as {fixed}: other batches are skipped")
    elif max(batches) > max(wanted):
        notes.append(f"an .onnx is run at batches {', '.join(map(str, wanted))} when it is adopted, not at {max(batches)}")
    try:
        session = _open(model, spec.file)
        tied = export_proof.tied_axes(session, signature)
        if tied:
            batch = str(signature.batch_symbol)
            export_graph.rename_dimensions(model, dict.fromkeys(tied, batch))
            signature = graph.signature(model)
            notes.append(
                f"the axes {', '.join(tied)} are taken for the batch: the graph runs only where they are as large as '{batch}'"
            )
        proof = export_proof.prove_runs(session, signature, wanted)
    except ModelError as exc:
        # It is not ours to mend: what cannot be run on made-up inputs may run on real ones, and each engine says so itself.
        proof = {"against": "nothing: the graph is the source", "runs": [], "failed": exc.message}
        notes.append(f"the graph did not run on made-up inputs: {exc.message}")
    facts: dict[str, Any] = {"proof": proof, "preprocess": None, "classes": None, "local_files": {}, "notes": notes}
    if outputs:
        facts["cut"] = list(outputs)
    return model, facts
