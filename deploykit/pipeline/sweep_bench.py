"""The evaluations of a sweep: in child processes, what was glimpsed kept for the next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifact as artifacts
from deploykit import backends, hosted, machine
from deploykit.artifact import Artifact
from deploykit.children import BugInChild, Child, in_a_line
from deploykit.configuration import Configuration, Score
from deploykit.errors import DeploykitError
from deploykit.measurement import MIN_RUNS, Measurement
from deploykit.pipeline.line import Ready
from deploykit.pipeline.request import Narrator
from deploykit.pipeline.workshop import backend_code
from deploykit.session import OpenRequest
from deploykit.signature import Feeds
from deploykit.stages import bench
from deploykit.store import source_hash

GLIMPSE_S = 0.1  # twice, and the better one counts: a glimpse may only rule out what is far behind
# One launch decides who stays; three, the recommendation: identical processes differ by about 3 %.
DURATIONS = {
    "look": bench.Duration("look", launches=1, rounds=4, seconds=0.8, limit_s=0.8, enough_runs=1),
    "final": bench.Duration("final", launches=3, rounds=4, seconds=3.0, limit_s=6.0, enough_runs=64),
}
GLIMPSE_COST_S = 1.0  # with opening the engine and warming it up


def durations(*, tail: bool) -> dict[str, bench.Duration]:
    """How long each round measures. `tail`: a limit is on the 90th percentile, so the last round goes on until there are runs
    enough for one, were there only one run a window: an engine that takes 0.1 s a run has 60 in 6 s."""
    final = DURATIONS["final"]
    if not tail:
        return DURATIONS
    rounds = -(-MIN_RUNS[90] // final.launches)
    return {**DURATIONS, "final": replace(final, limit_s=max(final.limit_s, final.seconds * rounds / final.rounds))}


class Notes:
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


class Evaluations:
    """The evaluations: glimpses in one child per engine, kept open for its next configuration; rounds as `bench` measures."""

    def __init__(self, made: Ready, pools: Mapping[int, list[Feeds]], digest: str, say: Narrator, *, tail: bool = False) -> None:
        self._made, self._pools, self._say = made, pools, say
        self._durations = durations(tail=tail)
        self._engines: dict[tuple[str, str], Artifact] = {(e.row.backend, e.row.precision): e.engine for e in made.entries}
        self.notes = Notes(made, digest)
        self.reused = 0
        self._child: Child | None = None
        self._serves: tuple[str, str, int, str] | None = None
        self._glimpsed = 0

    def __enter__(self) -> Evaluations:
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
        found = bench.measure(targets, self._pools, self._durations[effort], progress=self._say.progress)
        return {c: _score(c, found[str(c)]) for c in configurations}

    def _target(self, c: Configuration) -> bench.Target:
        return bench.Target(str(c), c.backend, self._engines[c.engine].path, self._opening(c), group="sweep")

    def _opening(self, c: Configuration) -> OpenRequest:
        options = backends.opening_options(c.backend, c.streams, c.layout)
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
        except (DeploykitError, BugInChild) as exc:
            self._close()
            return in_a_line(exc)
        kept[str(c)] = asdict(score)
        self.notes.save()
        return score

    def _measured(self, c: Configuration) -> Score:
        serves = (*c.engine, c.threads, c.layout)
        if self._serves != serves:
            self._close()
            self._child, self._serves = Child(str(c), threads=c.threads), serves
        assert self._child is not None
        call = self._child.call
        opening = self._opening(c)
        opened = call(hosted.open_engine, c.backend, self._engines[c.engine].path, opening, timeout_s=bench.OPEN_TIMEOUT_S)
        call(hosted.bind_briefly, self._pools[c.batch], timeout_s=bench.OPEN_TIMEOUT_S)
        windows = [call(hosted.window, GLIMPSE_S, timeout_s=bench.WINDOW_TIMEOUT_S) for _ in range(2)]
        p50_s = min(float(np.median(window.seconds)) for window in windows)
        # by the median, not the wall clock: one interruption would weigh too much in so short a window
        n = sum(len(window.seconds) for window in windows)
        return Score(c.batch * c.streams / p50_s, p50_s, n=n, ran=_ran(c, opened.precision))


def _ran(c: Configuration, precision: str) -> str:
    """The precision that really ran, where it is another than was asked for."""
    return "" if precision == c.precision else precision


def _score(c: Configuration, found: Measurement | DeploykitError) -> Score | str:
    if isinstance(found, DeploykitError):
        return found.message
    p50 = found.percentile_s(50)
    assert p50 is not None
    ran = _ran(c, found.precision)
    return Score(found.images_per_s, p50, found.percentile_s(90), found.n_timed, found.peak_rss_bytes or None, ran)
