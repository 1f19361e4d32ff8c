"""sweep: the search's space from what this machine can run, its evaluations in children, what was glimpsed kept for next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifact as artifacts
from deploykit import backends, hosted, machine
from deploykit.artifact import Artifact
from deploykit.children import BugInChild, Child
from deploykit.drift import Drift
from deploykit.errors import EXIT_BACKEND, EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_PASSED, DeploykitError, InputError, MissingBackend
from deploykit.measurement import Measurement
from deploykit.pipeline import line, measuring
from deploykit.pipeline.line import LineRequest, Ready
from deploykit.pipeline.request import Narrator
from deploykit.pipeline.workshop import backend_code
from deploykit.session import OpenRequest
from deploykit.signature import Feeds
from deploykit.stages import bench, sweep
from deploykit.stages.sweep import Configuration, Found, Limits, Quality, Score
from deploykit.store import source_hash

GLIMPSE_S = 0.1  # twice, and the better one counts: a glimpse may only rule out what is far behind
# One launch decides who stays; three, the recommendation: identical processes differ by about 3 %.
_DURATIONS = {
    "look": bench.Duration("look", launches=1, rounds=4, seconds=0.8, limit_s=0.8, enough_runs=1),
    "final": bench.Duration("final", launches=3, rounds=4, seconds=3.0, limit_s=6.0, enough_runs=64),
}
_GLIMPSE_COST_S = 1.0  # with opening the engine and warming it up
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SweepRequest:
    """What is swept (`line`'s batches, backends, precisions), over which threads and streams (None: all of this machine's
    threads; 1, 2, 4, ... requests at once), and what a recommendation must keep. command: how to reproduce a row."""

    line: LineRequest
    limits: Limits
    threads: tuple[int, ...] | None = None
    streams: tuple[int, ...] | None = None
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

    def reproduce(self, configuration: Configuration) -> str:
        """The command that measures a configuration again."""
        c = configuration
        own = ["--backend", c.backend, "--precision", c.precision, "--batch", str(c.batch), "--threads", str(c.threads)]
        own += ["--streams", str(c.streams)] if c.streams > 1 else []
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
    with _Bench(made, pools, digest, say) as evaluations:
        qualities = _qualities(made, evaluations.notes, say)
        say.step(f"sweep: {len(space)} configurations, at most about {_most_s(space):,.0f} s")
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


def _most_s(space: Sequence[Configuration]) -> float:
    looks = min(len(space), sweep.MOST["glimpse"]) * (_DURATIONS["look"].seconds + _GLIMPSE_COST_S)
    final = _DURATIONS["final"]
    return len(space) * (GLIMPSE_S + _GLIMPSE_COST_S) + looks + sweep.MOST["look"] * (final.limit_s + 3 * _GLIMPSE_COST_S)


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
            found |= dict.fromkeys(Configuration(row.backend, row.precision, row.batch, count, s) for s in able)
    if not found:
        raise InputError(f"no backend here runs {request.streams} requests at once on {threads} threads", "add --streams 1")
    return list(found)


def _qualities(made: Ready, notes: _Notes, say: Narrator) -> dict[tuple[str, str], Quality]:
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


class _Notes:
    """What is kept between two sweeps of the same thing: one JSON file in the store, of the same engines, samples, machine,
    versions and code."""

    def __init__(self, made: Ready, digest: str) -> None:
        package = Path(__file__).parent.parent
        own = {file for e in made.entries for file in backend_code(e.row.backend)}
        code = [*sorted(own), package / "hosted.py", Path(__file__)]
        engines = sorted([e.row.id, e.engine.sha256, e.engine.parent or ""] for e in made.entries)
        judge = made.samples.judge
        labels = repr(judge.labels) if judge is not None else ""
        shapes = repr(sorted(made.rows.shapes.items()))
        versions = sorted(item for e in made.entries for item in backends.get(e.row.backend).versions().items())
        parts = [source_hash(*code), engines, digest, judge.digest if judge else "", labels, shapes, versions]
        mark = hashlib.sha256(json.dumps([*parts, machine.fingerprint()], default=str).encode()).hexdigest()
        self.path = made.store.root / f".sweep-{mark[:20]}.json"
        self.doc: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            self.doc = dict(json.loads(self.path.read_text()))

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        artifacts.write_atomically(self.path, json.dumps(self.doc).encode())


class _Bench:
    """The evaluations: glimpses in one child per engine, kept open for its next configuration; rounds as `bench` measures."""

    def __init__(self, made: Ready, pools: Mapping[int, list[Feeds]], digest: str, say: Narrator) -> None:
        self._made, self._pools, self._say = made, pools, say
        self._engines: dict[tuple[str, str], Artifact] = {(e.row.backend, e.row.precision): e.engine for e in made.entries}
        self.notes = _Notes(made, digest)
        self.reused = 0
        self._child: Child | None = None
        self._serves: tuple[str, str, int] | None = None
        self._glimpsed = 0

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.close()
        self._child = self._serves = None

    def evaluate(self, configurations: Sequence[Configuration], effort: str) -> dict[Configuration, Score | str]:
        """The scores of one round, or why there is none."""
        if effort == "glimpse":
            return {c: self._glimpse(c) for c in configurations}
        self._close()
        self._say.step(f"{effort}: {len(configurations)} configurations in turns")
        targets = [self._target(c) for c in configurations]
        found = bench.measure(targets, self._pools, _DURATIONS[effort], progress=self._say.progress)
        return {c: _score(found[str(c)]) for c in configurations}

    def _target(self, c: Configuration) -> bench.Target:
        return bench.Target(str(c), c.backend, self._engines[c.engine].path, self._opening(c), group="sweep")

    def _opening(self, c: Configuration) -> OpenRequest:
        options = {"streams": c.streams} if c.streams > 1 else {}
        return OpenRequest(c.precision, c.batch, c.threads, dict(self._made.rows.shapes), options)

    def _glimpse(self, c: Configuration) -> Score | str:
        kept = self.notes.doc.setdefault("glimpses", {})
        self._glimpsed += 1
        self._say.progress(str(c), min(0.95, 0.02 * self._glimpsed))
        if str(c) in kept:
            self.reused += 1
            return Score(**kept[str(c)])
        try:
            score = self._measured(c)
        except DeploykitError as exc:
            self._close()
            return exc.message
        except BugInChild as exc:
            self._close()
            return str(exc).strip().splitlines()[-1]
        kept[str(c)] = asdict(score)
        self.notes.save()
        return score

    def _measured(self, c: Configuration) -> Score:
        serves = (*c.engine, c.threads)
        if self._serves != serves:
            self._close()
            self._child, self._serves = Child(str(c), threads=c.threads), serves
        assert self._child is not None
        call = self._child.call
        call(hosted.open_engine, c.backend, self._engines[c.engine].path, self._opening(c), timeout_s=bench.OPEN_TIMEOUT_S)
        call(hosted.bind_briefly, self._pools[c.batch], timeout_s=bench.OPEN_TIMEOUT_S)
        windows = [call(hosted.window, GLIMPSE_S, timeout_s=bench.WINDOW_TIMEOUT_S) for _ in range(2)]
        p50_s = min(float(np.median(window.seconds)) for window in windows)
        # by the median, not the wall clock: one interruption would weigh too much in so short a window
        return Score(c.batch * c.streams / p50_s, p50_s, n=sum(len(window.seconds) for window in windows))


def _score(found: Measurement | DeploykitError) -> Score | str:
    if isinstance(found, DeploykitError):
        return found.message
    p50 = found.percentile_s(50)
    assert p50 is not None
    return Score(found.images_per_s, p50, found.percentile_s(90), found.n_timed, found.peak_rss_bytes or None)


def lines(swept: Swept) -> Iterator[str]:
    """The recommendation for a person, its limits and the command that measures it again."""
    best = swept.found.best
    if best is None:
        if swept.all_failed:
            yield "every configuration that was tried failed to open or run:"
        else:
            yield "nothing here keeps the limits; what came closest, and why it was out:"
        yield from (f"  {t.configuration}: {t.out}" for t in swept.found.trials[:5])
        return
    score, quality = swept.found.trial(best).score, swept.qualities[best.engine]
    assert score is not None
    tail = f", p90 {score.p90_s * 1e3:.3g} ms" if score.p90_s is not None else ""
    yield f"recommended: {best}: {score.images_per_s:,.4g} img/s, p50 {score.p50_s * 1e3:.3g} ms{tail}"
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
