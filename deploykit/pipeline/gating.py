"""The gate: a run, or its report, held against a baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from deploykit import artifact as artifacts
from deploykit import machine
from deploykit.artifact import Artifact
from deploykit.drift import Drift
from deploykit.errors import InputError
from deploykit.measurement import Measurement
from deploykit.pipeline import baselines, remeasuring
from deploykit.pipeline.assemble import measured_id
from deploykit.pipeline.baselines import OUTCOMES, Run
from deploykit.pipeline.line import LineResult
from deploykit.pipeline.measuring import engine_id
from deploykit.pipeline.remeasuring import Again, EngineKey
from deploykit.pipeline.request import Narrator, Silent
from deploykit.report_document import Report
from deploykit.stages import gate as gates
from deploykit.verdict import Verdict

__all__ = ["OUTCOMES", "Again", "GateRequest", "check", "gate", "judge", "measured_outcomes", "update"]

DEFAULT_LIMITS = gates.Limits(max_drop_pp=0.5, max_slowdown=0.05)  # where there is a baseline and no limit


@dataclass(frozen=True)
class GateRequest:
    """What is held against what: without any limit, a baseline by DEFAULT_LIMITS. remeasure: both engines in turns, None where
    both sides are run folders of this machine and a limit asks for it."""

    baseline: Path | None = None
    limits: gates.LimitSet = field(default_factory=gates.LimitSet)
    remeasure: bool | None = None
    again: Again = field(default_factory=Again)

    @property
    def asked(self) -> bool:
        """Whether anything is to be judged at all."""
        return self.baseline is not None or self.limited

    @property
    def limited(self) -> bool:
        """Whether any limit was given."""
        return any(one != gates.Limits() for one in self.limits.all())

    @property
    def held(self) -> gates.LimitSet:
        """The limits that stand."""
        return self.limits if self.limited or self.baseline is None else gates.LimitSet(DEFAULT_LIMITS)


def check(request: GateRequest, *, own_machine: bool = True, out: Path | None = None) -> None:
    """Raises InputError for what cannot be judged, before anything is spent on a run. `own_machine`: the run to come is this
    machine's, so a folder of baselines must have one for its class, and the baseline's engines must be whole. out: the folder
    that the run will write."""
    remeasuring.span(request.again.duration)
    if request.again.preprocess is not None and request.again.data is None:
        raise InputError("--preprocess says how --data is read, and there is none", "add --data DATA, or leave it out")
    if request.remeasure and not request.held.timed:
        raise InputError("--remeasure measures speed, memory and start-up, and no limit is on them", "add --max-slowdown 5%")
    if request.baseline is not None and out is not None and baselines.is_of(request.baseline, out):
        raise InputError(
            f"the run would replace {request.baseline}, its own baseline", "choose another folder with -o, or keep a copy"
        )
    if request.baseline is None:
        for name, option in (
            ("max_slowdown", "--max-slowdown"),
            ("max_size_growth", "--max-size-growth"),
            ("max_memory_growth", "--max-memory-growth"),
            ("max_startup_growth", "--max-startup-growth"),
        ):
            if request.limits.asks(name):
                raise InputError(
                    f"{option} needs something to be held against", "add --baseline BASE, a run's folder or report.json"
                )
        if request.remeasure:
            raise InputError("--remeasure needs two run folders", "add --baseline DIR")
        return
    if own_machine:
        base = baselines.open_baseline(request.baseline, machine.describe())
        if base.folder is not None:
            remeasuring.of_folder(base.folder)


def judge(result: LineResult, request: GateRequest, narrator: Narrator | None = None) -> tuple[Report, Verdict | None]:
    """The report with its verdict, where --baseline or a limit asked for one."""
    if not request.asked:
        return result.report, None
    run = Run(result.report, gates.outcomes_of(measured_outcomes(result)))
    verdict = _verdict(run, remeasuring.by_key(result.built), request, narrator or Silent())
    return result.report.with_verdict(verdict), verdict


def measured_outcomes(result: LineResult) -> dict[str, Drift]:
    """Per-sample outcomes of every measured row, by row id."""
    if result.results is None:
        return {}
    found: dict[str, Drift] = {}
    for entry in result.entries:
        drift, measured = result.results.drifts.get(engine_id(entry.row)), result.results.measured.get(entry.row.id)
        if isinstance(drift, Drift) and isinstance(measured, Measurement):
            found[measured_id(entry.row, measured)] = drift
    return found


def gate(report_file: Path, request: GateRequest, junit: Path | None, narrator: Narrator | None = None) -> Verdict:
    """The verdict on a finished run. Raises InputError for files that cannot be read and for limits that make no sense."""
    if not request.asked:
        raise InputError("nothing to judge by", "add --baseline BASE, and --max-drop 0.5pp or --max-slowdown 5%")
    if junit is not None and junit.is_dir():
        raise InputError(f"--junit {junit} is a folder", "name a file")
    run = baselines.open_run(report_file)
    mine = remeasuring.of_folder(run.folder) if run.folder is not None and request.baseline is not None else {}
    verdict = _verdict(run, mine, request, narrator or Silent())
    if junit is not None:
        from deploykit.stages.report import junit as junit_xml

        artifacts.write_atomically(junit, junit_xml.text(verdict).encode())
    return verdict


def update(report_file: Path, baseline: Path) -> tuple[Path, list[str]]:
    """Moves the baseline to the run; returns what was written, and the change row by row."""
    return baselines.update(baselines.open_run(report_file), baseline)


def _verdict(run: Run, mine: dict[EngineKey, Artifact], request: GateRequest, narrator: Narrator) -> Verdict:
    limits = request.held
    if request.baseline is None:
        return gates.judge(run.report, None, limits, outcomes=run.outcomes)
    base = baselines.open_baseline(request.baseline, run.report.environment)
    theirs = remeasuring.of_folder(base.folder) if base.folder is not None else {}
    why_not = remeasuring.why_not(run.report, base.report, limits, bool(mine), bool(theirs))
    if request.remeasure and not (mine and theirs):
        raise InputError("--remeasure needs the engines of both runs", "give two run folders, made by `deploykit run -o`")
    fresh = None
    if limits.timed and (request.remeasure or (request.remeasure is None and not why_not)):
        fresh = remeasuring.measure(run.report, base.report, mine, theirs, limits, request.again, narrator)
    elif request.again.data is not None:
        why = why_not or "--no-remeasure"
        remedy = "--remeasure and two run folders" if limits.timed else "a limit on speed, like --max-slowdown 5%"
        raise InputError(f"--data is what engines are measured again on, and none are: {why}", f"leave it out, or give {remedy}")
    return gates.judge(run.report, base.report, limits, outcomes=run.outcomes, baseline_outcomes=base.outcomes, fresh=fresh)
