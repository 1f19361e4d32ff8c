"""The evaluations of a search for mixed precision; each runs in a child process, and only paths and small values come back."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import children
from deploykit.artifact import Artifact
from deploykit.calibration_table import CalibrationTable
from deploykit.drift import Drift
from deploykit.errors import DeploykitError
from deploykit.pipeline import int8
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.samples import Samples
from deploykit.signature import Feeds, Outputs
from deploykit.stages import accuracy
from deploykit.stages.mixed import Budget, Score

TIMEOUT_S = 1800.0
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


def quantizable(task: Task) -> list[str]:
    """Names of the layers that INT8 quantizes; runs in a child process."""
    from deploykit.stages import precision

    return precision.planned(task.path, task.table, task.layout, precision.Int8Options())[1]


def contributions(task: Task, few: Samples) -> Any:
    """Each layer's own part of the noise; runs in a child process."""
    from deploykit.stages import precision

    request = task.recipe.request
    options = precision.Int8Options(request.reduce_range, request.weight_scales, scale_correct=request.scale_correct is not False)
    return precision.contributions(task.path, task.table, task.layout, options, few, corrected=task.recipe.corrects)


def plain_int8(task: Task, out: Path) -> None:
    """All layers in INT8, uncorrected, for timing; runs in a child process."""
    from deploykit.stages import precision

    precision.to_int8(task.path, task.table, task.layout, out)


def trial(task: Task, kept: tuple[str, ...], out: Path) -> tuple[Artifact, Score]:
    """The graph with those layers in float, and its score on the tuning samples; runs in a child process."""
    rest = (
        "fp16" if task.layout == "tensorrt" else "fp32"
    )  # in FP32 TensorRT runs them slower, and TensorRT-RTX for sm75 not at all
    made = int8.write(task.path, task.table, task.layout, rest, task.recipe, kept, out)
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
