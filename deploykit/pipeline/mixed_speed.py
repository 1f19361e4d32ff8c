"""The speed of a mixed graph beside plain INT8 and float, measured in turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit import backends, children
from deploykit.artifact import Artifact
from deploykit.measurement import Measurement
from deploykit.pipeline import mixed_trials
from deploykit.pipeline.mixed_trials import TIMEOUT_S, Task
from deploykit.pipeline.request import Narrator
from deploykit.session import OpenRequest
from deploykit.stages import bench

DURATION = "quick"


def beside(
    task: Task, folder: Path, made: Mapping[frozenset[str], Artifact], best: Artifact, narrator: Narrator
) -> dict[str, Any]:
    """Images per second of float, plain INT8 and the choice, measured in turns; what could not be measured is left out."""
    if task.layout == "tensorrt":
        return {"note": "not measured: the graph is for TensorRT, and its speed on a CPU says nothing of that on a GPU"}
    name = next((n for n in ("openvino", "onnxruntime") if backends.get(n).missing() is None), None)
    if name is None:
        return {"note": "not measured: neither OpenVINO nor ONNX Runtime is here"}
    batch = task.tune.signature.fixed_batch or 1
    rows = {"mixed": best}
    plain = made.get(frozenset())
    if plain is None:
        path = folder / "plain.onnx"
        if not path.is_file():
            children.run("mixed", mixed_trials.plain_int8, task, path, timeout_s=TIMEOUT_S)
        plain = replace(best, path=path, precision="int8", companions={})
    rows["int8"] = plain
    copy = folder / "float"
    copy.mkdir()
    children.run("mixed", copy_model, task.path, copy / "model.onnx")
    rows["fp32"] = replace(best, path=copy / "model.onnx", precision="fp32", companions={})
    narrator.step(f"mixed: speed beside INT8 and FP32 ({name}, batch {batch})")
    targets = []
    for precision, artifact in rows.items():
        kept = artifact.save()
        request = OpenRequest(precision, batch, children.available_threads())
        targets.append(bench.Target(precision, name, kept.path, request, "mixed", precision == "fp32"))
    wanted = [i % len(task.tune) for i in range(4 * batch)]
    pools = {batch: [feeds for feeds, _ in task.tune.take(wanted, "tune").batches(batch, pad=True)]}
    found = bench.measure(targets, pools, bench.duration(DURATION), progress=narrator.progress)
    doc: dict[str, Any] = {"backend": name, "batch": batch}
    for precision, result in found.items():
        if isinstance(result, Measurement):
            doc[f"{precision}_images_per_s"] = result.images_per_s
        else:
            doc["note"] = f"{precision} was not measured: {result}"
    if "mixed_images_per_s" in doc and "int8_images_per_s" in doc:
        doc["share_of_int8"] = doc["mixed_images_per_s"] / doc["int8_images_per_s"]
    return doc


def copy_model(path: Path, out: Path) -> None:
    """The model with its weights inside or beside it; runs in a child process."""
    from deploykit import graph

    graph.save(graph.load(path), out)
