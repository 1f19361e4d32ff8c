"""Mixed precision on a budget: the search's evaluations, each in a child process; what was evaluated is kept for the next time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploykit import artifact as artifacts
from deploykit import children
from deploykit.artifact import Artifact
from deploykit.errors import InputError
from deploykit.pipeline import mixed_speed, mixed_trials
from deploykit.pipeline.mixed_trials import TIMEOUT_S
from deploykit.pipeline.mixed_trials import Task as Task
from deploykit.pipeline.request import Narrator
from deploykit.samples import Samples
from deploykit.stages import mixed, mixed_cost
from deploykit.stages.mixed import Budget, Layer, Score, Trial

TUNE_N = 256
RANK_N = 16
MARGIN_DB = 0.3  # the tuning samples are not those that judge


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


def find(
    task: Task, folder: Path, notes: Path, narrator: Narrator, better: Callable[[Artifact], None], *, name: str = "model.onnx"
) -> Artifact:
    """The best graph for the budget, unsaved, in `folder`; its facts hold 'mixed': what was kept, the scores, what it costs.

    notes: the JSON file where evaluations are kept; one of the same task goes on from there. `better` gets each graph that is the
    best so far, at once. name: of the graph's file, of which the name of its external data is made. Raises what quantizing raises, and InputError for a budget these samples cannot judge.
    """
    known = _known(notes, task.mark)
    made: dict[frozenset[str], Artifact] = {}

    def make(kept: frozenset[str]) -> tuple[Artifact, Score]:
        out = folder / f"trial-{len(made)}"
        out.mkdir()
        artifact, score = children.run(
            "mixed", mixed_trials.trial, task, tuple(sorted(kept)), out / name, timeout_s=TIMEOUT_S, progress=narrator.progress
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
        judged = children.run(
            "judge", mixed_trials.score, task.path, best.path, task.judge, timeout_s=TIMEOUT_S, progress=narrator.progress
        )
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
        "speed": mixed_speed.beside(task, folder, made, best, narrator),
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
        names = children.run("mixed", mixed_trials.quantizable, task)
        return [Layer(name, 0.0, 0.0) for name in names], "not measured: INT8 alone meets the budget"
    if "noise" not in known:
        few = task.tune.take(range(min(RANK_N, len(task.tune))), task.tune.role)
        narrator.step(f"mixed: what each layer costs in accuracy, on {len(few)} samples")
        found = children.run("mixed", mixed_trials.contributions, task, few, timeout_s=TIMEOUT_S, progress=narrator.progress)
        narrator.step("mixed: what each layer costs in time")
        plain = folder / "plain.onnx"
        children.run("mixed", mixed_trials.plain_int8, task, plain, timeout_s=TIMEOUT_S)
        feeds = next(iter(few.batches(task.tune.signature.fixed_batch or 1)))[0]
        costs, unit = children.run(
            "mixed", mixed_cost.costs, task.path, plain, list(found.noise), found.outputs, feeds, progress=narrator.progress
        )
        known |= {"noise": found.noise, "cost": costs, "unit": unit}
        _save(notes, known)
    return [Layer(name, float(noise), float(known["cost"][name])) for name, noise in known["noise"].items()], known["unit"]


def _with_facts(made: Artifact, task: Task, found: Trial, more: Mapping[str, Any]) -> Artifact:
    doc = {
        "budget": task.budget.in_words(),
        "kept_in_float": sorted(found.kept),
        "tuned": found.score.to_json(),
        "tuned_in_words": found.score.in_words(),
        **more,
    }
    return replace(made, facts={**made.facts, "mixed": doc})


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
