"""Mixed precision on a budget: the search's evaluations, each in a child process; what was evaluated is kept for the next time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifact as artifacts
from deploykit import backends, children
from deploykit.artifact import Artifact
from deploykit.calibration_table import CalibrationTable
from deploykit.drift import Drift
from deploykit.errors import DeploykitError, InputError
from deploykit.measurement import Measurement
from deploykit.pipeline import int8
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.pipeline.request import Narrator
from deploykit.samples import Samples
from deploykit.session import OpenRequest
from deploykit.signature import Feeds, Outputs
from deploykit.stages import accuracy, bench, mixed, mixed_cost
from deploykit.stages.mixed import Budget, Layer, Score, Trial

TUNE_N = 256
RANK_N = 16
TIMEOUT_S = 1800.0
MARGIN_DB = 0.3  # the tuning samples are not those that judge
DURATION = "quick"  # of the speed measured at the end
_BATCH = 8


@dataclass(frozen=True)
class Task:
    """What is searched for. calibrate (in the recipe), tune and judge share no sample; judge may be missing."""

    path: Path
    layout: str
    table: CalibrationTable
    recipe: Int8Recipe
    budget: Budget
    tune: Samples
    judge: Samples | None = None

    @property
    def mark(self) -> str:
        """sha256 over all that a trial's score depends on but the choice itself."""
        package = Path(__file__).parent.parent
        code = [*sorted((package / "stages" / "precision").glob("*.py")), Path(int8.__file__), Path(__file__)]
        doc = [self.layout, self.table.fingerprint, self.recipe.to_json(), self.tune.digest, self.tune.labels]
        digest = hashlib.sha256(json.dumps(doc, sort_keys=True, default=list).encode())
        for file in code:
            digest.update(file.read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Aim:
    """What a mixed row is to keep, and the samples that the search tunes on."""

    budget: Budget
    tune: Samples


def tuning_share(samples: Samples) -> tuple[Samples, Samples]:
    """(what calibrates, what the search tunes on): the last third of a calibration share, at most TUNE_N samples.

    Raises InputError where there are fewer than three.
    """
    if len(samples) < 3:
        raise InputError(
            f"mixed precision needs samples to calibrate, to tune and to judge, and the calibration share has {len(samples)}",
            "give more data",
        )
    cut = len(samples) - min(TUNE_N, len(samples) // 3)
    return samples.take(range(cut), "calibrate"), samples.take(range(cut, len(samples)), "tune")


def find(task: Task, folder: Path, notes: Path, narrator: Narrator, better: Callable[[Artifact], None]) -> Artifact:
    """The best graph for the budget, unsaved, in `folder`; its facts hold 'mixed': what was kept, the scores, what it costs.

    notes: the JSON file where evaluations are kept; one of the same task goes on from there. `better` gets each graph that is the
    best so far, at once. Raises what quantizing raises, and InputError for a budget these samples cannot judge.
    """
    known = _known(notes, task.mark)
    made: dict[frozenset[str], Artifact] = {}

    def make(kept: frozenset[str]) -> tuple[Artifact, Score]:
        out = folder / f"trial-{len(made)}"
        out.mkdir()
        artifact, score = children.run(
            "mixed", trial, task, tuple(sorted(kept)), out / "model.onnx", timeout_s=TIMEOUT_S, progress=narrator.progress
        )
        made[kept] = replace(artifact, precision="mixed" if kept else "int8")
        return made[kept], score

    def evaluate(kept: frozenset[str]) -> Score:
        key = " ".join(sorted(kept))
        if key not in known["trials"]:
            narrator.step(f"mixed: {len(kept)} layer{'' if len(kept) == 1 else 's'} in float, on {len(task.tune)} samples")
            known["trials"][key] = make(kept)[1].to_json()
            _save(notes, known)
        return Score.from_json(known["trials"][key])

    def tell(found: Trial) -> None:
        if found.kept in made:
            better(_with_facts(made[found.kept], task, found, {"finished": False}))

    layers, unit = _layers(task, folder, known, notes, narrator, evaluate)
    aim = (
        task.budget if task.budget.min_sqnr_db is None else replace(task.budget, min_sqnr_db=task.budget.min_sqnr_db + MARGIN_DB)
    )
    result = mixed.search(layers, evaluate, aim, better=tell)
    best = made.get(result.best.kept)
    if best is None:
        narrator.step("mixed: the best choice once more")
        best, _ = make(result.best.kept)
    judged = result.best.score
    if task.judge is not None and len(task.judge):
        narrator.step(f"mixed: judged on {len(task.judge)} samples")
        judged = children.run("judge", score, task.path, best.path, task.judge, timeout_s=TIMEOUT_S, progress=narrator.progress)
    missed = task.budget.shortfall(judged)
    total = sum(layer.cost for layer in layers)
    more = {
        "finished": True,
        "met": missed == 0,
        "shortfall": missed,
        "judged": judged.to_json(),
        "judged_in_words": judged.in_words(),
        "judged_on_its_own_samples": judged is not result.best.score,
        "trials": len(result.trials),
        "cost_unit": unit,
        "cost_share": sum(layer.cost for layer in layers if layer.name in result.best.kept) / total if total else None,
        "layers": [{"node": x.name, "noise": x.noise, "cost": x.cost} for x in mixed.ranked(layers)],
        "speed": _speed(task, folder, made, best, narrator),
    }
    return _with_facts(best, task, result.best, more)


def _known(notes: Path, mark: str) -> dict[str, Any]:
    """What an earlier search of the same task has left; empty for another's, or for a damaged file."""
    empty: dict[str, Any] = {"mark": mark, "trials": {}}
    try:
        doc = json.loads(notes.read_text())
    except (OSError, ValueError):
        return empty
    fits = isinstance(doc, dict) and doc.get("mark") == mark and len({"noise", "cost", "unit"} & doc.keys()) in (0, 3)
    try:
        if fits:
            [Score.from_json(trial) for trial in doc["trials"].values()]
    except (KeyError, TypeError, AttributeError):
        return empty
    return doc if fits else empty


def _save(notes: Path, known: Mapping[str, Any]) -> None:
    artifacts.write_atomically(notes, json.dumps(known, indent=1, sort_keys=True).encode())


def _layers(
    task: Task,
    folder: Path,
    known: dict[str, Any],
    notes: Path,
    narrator: Narrator,
    evaluate: Callable[[frozenset[str]], Score],
) -> tuple[list[Layer], str]:
    """The layers with their noise and cost. Plain INT8 is tried first: where it meets the budget, nothing needs to be ranked."""
    if task.budget.shortfall(evaluate(frozenset())) == 0 and "noise" not in known:
        names = children.run("mixed", quantizable, task)
        return [Layer(name, 0.0, 0.0) for name in names], "not measured: INT8 alone meets the budget"
    if "noise" not in known:
        few = task.tune.take(range(min(RANK_N, len(task.tune))), task.tune.role)
        narrator.step(f"mixed: what each layer costs in accuracy, on {len(few)} samples")
        found = children.run("mixed", contributions, task, few, timeout_s=TIMEOUT_S, progress=narrator.progress)
        narrator.step("mixed: what each layer costs in time")
        plain = folder / "plain.onnx"
        children.run("mixed", plain_int8, task, plain, timeout_s=TIMEOUT_S)
        feeds = next(iter(few.batches(task.tune.signature.fixed_batch or 1)))[0]
        costs, unit = children.run(
            "mixed", mixed_cost.costs, task.path, plain, list(found.noise), found.outputs, feeds, progress=narrator.progress
        )
        known |= {"noise": found.noise, "cost": costs, "unit": unit}
        _save(notes, known)
    return [Layer(name, float(noise), float(known["cost"][name])) for name, noise in known["noise"].items()], known["unit"]


def quantizable(task: Task) -> list[str]:
    """Names of the layers that INT8 quantizes; runs in a child process."""
    from deploykit.stages import precision

    return precision.planned(task.path, task.table, task.layout, precision.Int8Options())[1]


def contributions(task: Task, few: Samples) -> Any:
    """Each layer's own part of the noise; runs in a child process."""
    from deploykit.stages import precision

    request = task.recipe.request
    options = precision.Int8Options(request.reduce_range, request.weight_scales)
    return precision.contributions(task.path, task.table, task.layout, options, few, centred=task.recipe.corrects)


def plain_int8(task: Task, out: Path) -> None:
    """All layers in INT8, uncorrected, for timing; runs in a child process."""
    from deploykit.stages import precision

    precision.to_int8(task.path, task.table, task.layout, out)


def trial(task: Task, kept: tuple[str, ...], out: Path) -> tuple[Artifact, Score]:
    """The graph with those layers in float, and its score on the tuning samples; runs in a child process."""
    made = int8.write(task.path, task.table, task.layout, "fp32", task.recipe, kept, out)
    return made, score(task.path, out, task.tune)


def score(reference: Path, candidate: Path, samples: Samples) -> Score:
    """The candidate's score against the float model, Q/DQ computed as written; runs in a child process."""
    drift = accuracy.measure(
        samples,
        _literal(reference),
        {"candidate": _literal(candidate)},
        batch=samples.signature.fixed_batch or _BATCH,
        progress=children.report_progress,
    )["candidate"]
    if isinstance(drift, DeploykitError):
        raise drift
    return _score_of(drift)


def _score_of(drift: Drift) -> Score:
    sqnr = math.inf if drift.identical else drift.sqnr_db
    if drift.nonfinite:
        sqnr = 0.0
    return Score(drift.n, sqnr, drift.agreement, drift.top1_drop_pp)


def _literal(path: Path) -> accuracy.InferFn:
    from deploykit import graph
    from deploykit.stages import precision

    session = precision.literal_session(graph.load(path), None)
    names = [value.name for value in session.get_outputs()]

    def infer(feeds: Feeds) -> Outputs:
        return {name: np.asarray(value) for name, value in zip(names, session.run(names, dict(feeds)), strict=True)}

    return infer


def _with_facts(made: Artifact, task: Task, found: Trial, more: Mapping[str, Any]) -> Artifact:
    doc = {
        "budget": task.budget.in_words(),
        "kept_in_float": sorted(found.kept),
        "tuned": found.score.to_json(),
        "tuned_in_words": found.score.in_words(),
        **more,
    }
    return replace(made, facts={**made.facts, "mixed": doc})


def _speed(
    task: Task, folder: Path, made: Mapping[frozenset[str], Artifact], best: Artifact, narrator: Narrator
) -> dict[str, Any]:
    """Images per second of float, plain INT8 and the choice, measured in turns; what could not be measured is left out."""
    name = next((n for n in ("openvino", "onnxruntime") if backends.get(n).missing() is None), None)
    if name is None:
        return {"note": "not measured: neither OpenVINO nor ONNX Runtime is here"}
    batch = task.tune.signature.fixed_batch or 1
    rows = {"mixed": best}
    plain = made.get(frozenset())
    if plain is None:
        path = folder / "plain.onnx"
        if not path.is_file():
            children.run("mixed", plain_int8, task, path, timeout_s=TIMEOUT_S)
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


def lines(made: Artifact) -> list[str]:
    """What the search found, in words."""
    doc: dict[str, Any] = dict(made.facts["mixed"])
    kept = doc["kept_in_float"]
    said = [f"{len(kept)} of {len(doc['layers'])} layers in float" + (f": {', '.join(kept[:6])}" if kept else "")]
    if len(kept) > 6:
        said[0] += f" and {len(kept) - 6} more"
    where = "samples of its own" if doc["judged_on_its_own_samples"] else "the tuning samples"
    verdict = "met" if doc["met"] else "NOT met"
    said.append(f"budget {verdict} ({doc['budget']}): {doc['judged_in_words']}, {where}; {doc['trials']} trials")
    speed = doc["speed"]
    if "share_of_int8" in speed:
        said.append(
            f"speed in {speed['backend']} at batch {speed['batch']}: {speed['mixed_images_per_s']:.0f} images/s, "
            f"{100 * speed['share_of_int8']:.0f} % of plain INT8's {speed['int8_images_per_s']:.0f} "
            f"(FP32: {speed.get('fp32_images_per_s', float('nan')):.0f}); layers ranked by {doc['cost_unit']}"
        )
    if "note" in speed:
        said.append(f"speed: {speed['note']}")
    return said
