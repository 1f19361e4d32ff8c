"""sweep: the search's space from what this machine can run, and its recommendation in words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deploykit import backends, machine
from deploykit.configuration import EFFORTS, Configuration, Limits, Quality, Trial
from deploykit.drift import Drift
from deploykit.errors import EXIT_BACKEND, EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_PASSED, DeploykitError, InputError, MissingBackend
from deploykit.measurement import MIN_RUNS
from deploykit.pipeline import line, measuring
from deploykit.pipeline.line import LineRequest, Ready
from deploykit.pipeline.request import Narrator
from deploykit.pipeline.sweep_bench import DURATIONS, GLIMPSE_COST_S, GLIMPSE_S, Evaluations, Notes
from deploykit.stages import sweep
from deploykit.stages.sweep import Found

SCHEMA_VERSION = 1
_SHOWN = 5  # configurations that came closest, where none keeps the limits


@dataclass(frozen=True)
class SweepRequest:
    """What is swept (`line`'s batches, backends, precisions), over which threads and streams (None: all of this machine's
    threads; 1, 2, 4, ... requests at once; each layout that a backend has), and what a recommendation must keep. command: how
    to reproduce a row."""

    line: LineRequest
    limits: Limits
    threads: tuple[int, ...] | None = None
    streams: tuple[int, ...] | None = None
    layouts: tuple[str, ...] | None = None
    objective: str = "throughput"
    budget_s: float | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Swept:
    """The end of a sweep, with the accuracy of every engine, and the rows of the plan that had none."""

    found: Found
    qualities: Mapping[tuple[str, str], Quality]
    request: SweepRequest
    absent: Mapping[str, str]
    judged_on: int
    reused: int
    environment: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def exit_code(self) -> int:
        """0; 1 where nothing keeps the limits; 4 where whatever was tried failed to open or run; 5 where too few samples judge
        to show that the recommendation keeps the limits."""
        if self.found.best is None:
            return EXIT_BACKEND if self.all_failed else EXIT_FAILED
        return EXIT_PASSED if self.qualities[self.found.best.engine].shown(self.request.limits) else EXIT_INCONCLUSIVE

    @property
    def all_failed(self) -> bool:
        """Whether every configuration that was tried failed to open or run."""
        tried = [t for t in self.found.trials if t.scores or t.failed]
        return bool(tried) and all(t.failed for t in tried)

    def distance(self, trial: Trial) -> tuple[float, ...]:
        """How far a trial is from the limits, for sorting: by the accuracy it loses over the limit, how carefully it was
        measured, its latency and its memory over the limits; what is not known counts as far."""
        limits, score = self.request.limits, trial.score
        drop = self.qualities.get(trial.configuration.engine, Quality()).drop_pp
        tail = None if score is None else score.p90_s or score.p50_s
        held = None if score is None else score.peak_rss_bytes
        stages = len(EFFORTS) - (EFFORTS.index(trial.effort) + 1 if trial.effort else 0)

        def over(value: float | None, limit: float | None) -> float:
            return 0.0 if limit is None else math.inf if value is None else max(0.0, value - limit) / (limit or 1.0)

        too_much = over(drop, limits.max_drop_pp), over(tail, limits.max_latency_s), over(held, limits.max_memory_bytes)
        return (float(trial.failed), too_much[0], float(stages), too_much[1], too_much[2])

    def reproduce(self, configuration: Configuration) -> str:
        """The command that measures a configuration again."""
        c = configuration
        own = ["--backend", c.backend, "--precision", c.precision, "--batch", str(c.batch), "--threads", str(c.threads)]
        own += ["--streams", str(c.streams)] if c.streams > 1 else []
        own += ["--layout", c.layout] if c.layout else []
        return shlex.join([*self.request.command, *own, "--duration", "standard"])

    def to_json(self) -> dict[str, Any]:
        """The sweep as one JSON document."""
        best = self.found.best
        return {
            "schema_version": SCHEMA_VERSION,
            "recommended": None if best is None else self._entry(best) | {"command": self.reproduce(best)},
            "shown": best is not None and self.exit_code == EXIT_PASSED,
            "objective": self.request.objective,
            "limits": asdict(self.request.limits),
            "front": [self._entry(c) for c in self.found.front],
            "trials": [t.to_json() for t in self.found.trials],
            "absent": dict(self.absent),
            "judged_on": self.judged_on,
            "glimpses_reused": self.reused,
            "spent_s": self.found.spent_s,
            "environment": dict(self.environment),
            "versions": dict(self.versions),
        }

    def _entry(self, configuration: Configuration) -> dict[str, Any]:
        trial, quality = self.found.trial(configuration), self.qualities.get(configuration.engine, Quality())
        score = asdict(trial.score) if trial.score is not None else {}
        return {**asdict(configuration), **score, **asdict(quality), "effort": trial.effort}


def take(request: SweepRequest, say: Narrator) -> Swept:
    """The sweep of one model. Raises what the line raises before it measures, MissingBackend where no engine runs here, and
    InputError for limits that nothing here could judge and for mixed precision, whose budget is no limit of a sweep."""
    if "mixed" in (request.line.rows.precisions or ()):
        raise InputError(
            "a sweep does not try mixed precision: a mixed engine is searched for on a budget of its own",
            "leave it out of --precision; `deploykit bench --precision mixed --min-sqnr 25` measures one",
        )
    data = request.line.data.data
    if request.limits.max_drop_pp is not None and (data is None or data.partition(":")[0] == "random"):
        raise _no_labels()  # said before anything is built
    made = line.ready(request.line, say)
    if len(made.models) != 1:
        raise InputError("a sweep takes one model", "give one SOURCE or .onnx file")
    absent = _absent(made)
    if not made.entries:
        raise MissingBackend("no engine of this model runs here: " + "; ".join(f"{k}: {v}" for k, v in absent.items()))
    if request.limits.max_drop_pp is not None and (made.samples.judge is None or made.samples.judge.labels is None):
        raise _no_labels()
    space = _space(made, request)
    pools, digest = line.pools_for(made.models[0].signature, made.samples.judge, {c.batch for c in space}, made.rows)
    latency_s = request.limits.max_latency_s
    with Evaluations(made, pools, digest, say, tail=latency_s is not None) as evaluations:
        qualities = _qualities(made, evaluations.notes, say)
        say.step(f"sweep: {len(space)} configurations, at most about {_most_s(space, latency_s or 0.0):,.0f} s")
        found = sweep.search(
            space, qualities, request.limits, evaluations.evaluate, objective=request.objective, budget_s=request.budget_s
        )
    versions: dict[str, str] = {}
    for name in {c.backend for c in space}:
        versions |= backends.get(name).versions()
    judge = made.samples.judge
    n = len(judge) if judge is not None else 0
    return Swept(found, qualities, request, absent, n, evaluations.reused, machine.describe(), dict(sorted(versions.items())))


def _no_labels() -> InputError:
    return InputError("--max-drop needs labelled samples to judge by", "add --data DATA with labels")


def _most_s(space: Sequence[Configuration], latency_s: float) -> float:
    """About the most seconds that a sweep takes; latency_s: the limit, 0 for none, that slow runs come near at most."""
    looks = min(len(space), sweep.MOST["glimpse"]) * (DURATIONS["look"].seconds + GLIMPSE_COST_S)
    final = max(DURATIONS["final"].limit_s, MIN_RUNS[90] * latency_s)
    return len(space) * (GLIMPSE_S + GLIMPSE_COST_S) + looks + sweep.MOST["look"] * (final + 3 * GLIMPSE_COST_S)


def _absent(made: Ready) -> dict[str, str]:
    """Why an engine of the plan is not in the space: skipped, failed, or made for other hardware."""
    found: dict[str, str] = {}
    for row in made.models[0].rows:
        engine = made.models[0].built.get(row.engine_key)
        name = f"{row.backend} {row.precision}"
        if row.skip:
            found.setdefault(name, row.skip)
        elif isinstance(engine, DeploykitError):
            found.setdefault(name, engine.message)
        elif not row.runnable:
            found.setdefault(f"{name} {row.target}", row.cannot_run)
    return found


def _space(made: Ready, request: SweepRequest) -> list[Configuration]:
    most = machine.threads()
    threads = request.threads or (most,)
    found: dict[Configuration, None] = {}
    for entry in made.entries:
        row = entry.row
        for count in threads:
            offered = request.streams or tuple(2**k for k in range(count.bit_length()) if 2**k <= count)
            able = [s for s in offered if s == 1 or (s <= count and backends.concurrent(row.backend))]
            ways = [(s, layout) for s in able for layout in _layouts(row.backend, request.layouts)]
            found |= dict.fromkeys(Configuration(row.backend, row.precision, row.batch, count, *way) for way in ways)
    if not found:
        raise InputError(f"no backend here runs {request.streams} requests at once on {threads} threads", "add --streams 1")
    return list(found)


def _layouts(backend: str, asked: Sequence[str] | None) -> list[str]:
    """The layouts to try of a backend, '' for its usual one; a backend that chooses by itself has that alone."""
    usual, *others = backends.layouts(backend)
    if not others or asked is None:
        return ["", *others]
    return ["" if layout == usual else layout for layout in asked]


def _qualities(made: Ready, notes: Notes, say: Narrator) -> dict[tuple[str, str], Quality]:
    """Accuracy and size of each engine: measured once, on the samples that judge, then kept; what failed is tried anew
    the next time."""
    sizes = {(e.row.backend, e.row.precision): e.engine.size_bytes for e in made.entries}
    kept = dict(notes.doc.get("qualities", {}))
    errors: dict[str, str] = {}
    if made.samples.judge is None:
        return {key: Quality(size_bytes=size) for key, size in sizes.items()}
    if any(f"{backend} {precision}" not in kept for backend, precision in sizes):
        threads = made.rows.threads or machine.threads()
        drifts = measuring.judged(made.entries, made.samples.judge, made.rows, threads, say)
        for entry in made.entries:
            drift = drifts.get(measuring.engine_id(entry.row))
            key = f"{entry.row.backend} {entry.row.precision}"
            if isinstance(drift, Drift):
                kept[key] = drift.row_figures()
            else:
                errors[key] = drift.message if drift is not None else "was not judged"
        notes.doc["qualities"] = kept
        notes.save()
    found: dict[tuple[str, str], Quality] = {}
    for (backend, precision), size in sizes.items():
        figures = kept.get(f"{backend} {precision}", {})
        drop, high = figures.get("top1_drop_pp"), figures.get("top1_drop_high")
        if drop is None and _is_reference(made, backend, precision) and figures.get("top1") is not None:
            drop = high = 0.0
        why = errors.get(f"{backend} {precision}", "")
        found[backend, precision] = Quality(drop, high, figures.get("agreement"), size, why)
    return found


def _is_reference(made: Ready, backend: str, precision: str) -> bool:
    return made.reference is not None and made.reference[1:3] == (backend, precision)


def lines(swept: Swept) -> Iterator[str]:
    """The recommendation for a person, its limits and the command that measures it again."""
    best = swept.found.best
    if best is None:
        if swept.all_failed:
            yield "every configuration that was tried failed to open or run:"
        else:
            yield "nothing here keeps the limits; what came closest, and why it was out:"
        yield from (f"  {t.configuration}: {t.out}" for t in sorted(swept.found.trials, key=swept.distance)[:_SHOWN])
        return
    score, quality = swept.found.trial(best).score, swept.qualities[best.engine]
    assert score is not None
    tail = f", p90 {score.p90_s * 1e3:.3g} ms" if score.p90_s is not None else ""
    yield f"recommended: {best}: {score.images_per_s:,.4g} img/s, p50 {score.p50_s * 1e3:.3g} ms{tail}"
    if score.ran:
        yield f"asked for {best.precision}, really ran {score.ran}"
    if quality.drop_pp is not None:
        upper = f" (at most {quality.drop_high:.2f} at 95 %)" if quality.drop_high is not None else ""
        yield f"loses {quality.drop_pp:.2f} pp of top-1{upper} on {swept.judged_on} samples"
    elif quality.agreement is not None:
        yield f"same top-1 as the reference on {quality.agreement:.2%} of {swept.judged_on} samples (no labels)"
    elif quality.unmeasured:
        yield f"its accuracy was not measured: {quality.unmeasured}"
    if not quality.shown(swept.request.limits):
        yield f"not shown to keep the limit: {swept.judged_on} samples are too few; give more data"
    measured = sum(bool(t.scores) for t in swept.found.trials)
    reused = f", {swept.reused} glimpses of them kept from before" if swept.reused else ""
    yield f"{measured} of {len(swept.found.trials)} configurations measured{reused}, {swept.found.spent_s:.0f} s"
    yield f"again: {swept.reproduce(best)}"
