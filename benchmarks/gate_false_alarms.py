"""How often the gate cries wolf, and how often it hears the wolf.

`record` measures A/A sessions: four processes of one engine, in turns, as one launch of the gate does; every other session with
a second process loading one core. `study` draws comparisons from them, exactly as the gate makes them: as many launches as
a standard run has, in each three of the four processes as old, old again and new; nothing differs, so each 'fail' is a false
alarm. With the new engine's seconds scaled it shows how often a slow-down is caught. `live` runs the whole gate on an engine
against itself. Accuracy is simulated: outcomes of 10,000 samples with a known drop and a known share that change sides.

    python benchmarks/gate_false_alarms.py record --sessions 64 && python benchmarks/gate_false_alarms.py live --runs 20
    python benchmarks/gate_false_alarms.py study
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import backends, graph, machine
from deploykit.artifact import Artifact, write_atomically
from deploykit.measurement import Measurement
from deploykit.pipeline import remeasuring
from deploykit.pipeline.remeasuring import Pair
from deploykit.row import Row
from deploykit.session import OpenRequest
from deploykit.stages import bench, gate
from deploykit.stages.gate.intervals import decide, paired_drop
from deploykit.stages.gate.resources import speed
from deploykit.stages.gate.turns import Contrasts, judged, lost, seconds_an_item, undisturbed_seconds

RESULTS = Path(__file__).parent / "results"
SESSIONS, FOUND = RESULTS / "gate_sessions.json", RESULTS / "gate_false_alarms.json"
# one thread and all of them: the second is what a busy machine hurts most
KINDS = (("onnxruntime", 1), ("openvino", 2))
CHILDREN = 4
STANDARD = remeasuring.span("standard")
# (what, by how much the new engine's times are scaled, the limit). A slow-down of just the limit is on the line by definition.
CASES = (("A/A", 1.0, 0.01), ("A/A", 1.0, 0.02), ("A/A", 1.0, 0.05), ("planted: 5 % slower", 1 / 0.95, 0.02))
ROW = Row("aa", "any", "fp32", 1, "ok")


def model(folder: Path) -> Artifact:
    """A small convolutional network whose run takes about a millisecond."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import tiny_models

    path = tiny_models.conv_net(folder / "model.onnx", size=64)
    return Artifact(path, "onnx", "fp32", graph.signature(graph.load(path)), "engine").save()


def pool() -> list[dict[str, NDArray[Any]]]:
    """Four different inputs."""
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(1, 3, 64, 64)).astype(np.float32)} for _ in range(4)]


@contextlib.contextmanager
def loaded(core_busy: bool) -> Iterator[None]:
    """With a second process that computes all the time."""
    other = subprocess.Popen([sys.executable, "-c", "while True: sum(range(10000))"]) if core_busy else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def record(sessions: int) -> None:
    """Adds A/A sessions to the file until there are that many."""
    doc = json.loads(SESSIONS.read_text()) if SESSIONS.is_file() else {"machine": machine.describe(), "sessions": []}
    seconds = STANDARD.seconds / STANDARD.launches
    span = bench.Duration("session", 1, STANDARD.rounds, seconds, seconds)
    with tempfile.TemporaryDirectory() as scratch:
        engine = model(Path(scratch))
        while len(doc["sessions"]) < sessions:
            number = len(doc["sessions"])
            (backend, threads), busy = KINDS[number // 2 % len(KINDS)], bool(number % 2)
            request = OpenRequest("fp32", 1, threads)
            targets = [bench.Target(str(i), backend, engine.path, request, "aa", i == 0) for i in range(CHILDREN)]
            with loaded(busy):
                found = bench.measure(targets, {1: pool()}, span, seed=number)
            measured = [m for m in found.values() if isinstance(m, Measurement)]
            assert len(measured) == CHILDREN, found
            doc["sessions"].append(
                {
                    "backend": backend,
                    "threads": threads,
                    "core_busy": busy,
                    "load_average": round(os.getloadavg()[0], 1),
                    "versions": backends.get(backend).versions(),
                    "run_s": [undisturbed_seconds(m)[0] for m in measured],
                    "wall_s": [seconds_an_item(m)[0] for m in measured],
                }
            )
            write_atomically(SESSIONS, (json.dumps(doc) + "\n").encode())
            print(f"session {number + 1} of {sessions}: {backend}, {'one core busy' if busy else 'as it is'}", flush=True)


def tables(sessions: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The contrasts of every session and every choice of three of its processes [sessions, choices, clocks, 2]: new over old,
    old again over old. `sessions`: logarithms of seconds [clocks, children, rounds] each."""
    found = []
    for session in sessions:
        row = []
        for chosen in permutations(range(CHILDREN), 3):
            old, again, new = session[:, chosen].transpose(1, 0, 2)
            row.append(np.stack([np.median(new - (old + again) / 2, axis=1), np.median(again - old, axis=1)], axis=1))
        found.append(row)
    return np.array(found)


def drawn(table: NDArray[np.float64], launches: int, rng: np.random.Generator, slower: float) -> tuple[Contrasts, Contrasts]:
    """One comparison's contrasts, of the undisturbed run and of the wall clock: a session a launch, with replacement; slower: by
    how much the new engine's times are scaled."""
    chosen = table[rng.integers(0, table.shape[0], launches), rng.integers(0, table.shape[1], launches)]
    run, wall = (Contrasts(chosen[:, clock, 0] + np.log(slower), chosen[:, clock, 1]) for clock in (0, 1))
    return run, wall


def verdict(table: NDArray[np.float64], rng: np.random.Generator, slower: float, limit: float) -> str:
    """What the gate says of one comparison of standard length, with further blocks where the first leaves it open."""
    launches, blocks = remeasuring.BLOCKS["standard"]
    run, wall = drawn(table, launches, rng, slower)
    for _ in range(blocks - 1):
        if judged(run, lost, limit)[0] != "inconclusive":
            break
        more = drawn(table, launches, rng, slower)
        run, wall = (
            Contrasts(np.append(a.new, b.new), np.append(a.again, b.again)) for a, b in zip((run, wall), more, strict=True)
        )
    outcomes = {r.outcome for r in speed(ROW, run, wall, limit)}
    return next(o for o in ("fail", "inconclusive", "pass") if o in outcomes)


def shares(found: Counter[str]) -> dict[str, float]:
    """The share of each outcome."""
    return {o: round(found[o] / found.total(), 5) for o in ("pass", "inconclusive", "fail")}


def study(comparisons: int) -> None:
    """Draws the comparisons and writes the result."""
    doc = json.loads(SESSIONS.read_text())
    groups: dict[str, list[NDArray[np.float64]]] = {}
    for s in doc["sessions"]:
        name = f"{s['backend']} {s['threads']} threads, {'a second process loads one core' if s['core_busy'] else 'as it is'}"
        groups.setdefault(name, []).append(np.log(np.array([s["run_s"], s["wall_s"]])))
    rng = np.random.default_rng(0)
    speeds: dict[str, Any] = {}
    drawn_from = {name: tables(sessions) for name, sessions in groups.items()}
    for what, slower, limit in CASES:
        total: Counter[str] = Counter()
        rows = {}
        for name, table in drawn_from.items():
            part = Counter(verdict(table, rng, slower, limit) for _ in range(comparisons // len(groups)))
            rows[name] = shares(part)
            total += part
        speeds[f"{what}, limit {100 * limit:g} %"] = {"comparisons": total.total(), "all": shares(total), "by group": rows}
        print(what, limit, shares(total), rows, flush=True)
    result = {
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": doc["machine"],
        "sessions": {name: len(found) for name, found in groups.items()},
        "load_average_of_sessions": [s["load_average"] for s in doc["sessions"]],
        "speed": speeds,
        "accuracy": accuracy(comparisons, rng),
        "live": json.loads(FOUND.read_text()).get("live") if FOUND.is_file() else None,
    }
    write_atomically(FOUND, (json.dumps(result, indent=1) + "\n").encode())


def accuracy(comparisons: int, rng: np.random.Generator) -> dict[str, Any]:
    """Outcomes of 10,000 samples, 90 % right before: `gained` of them won, `gained` + `drop` lost, in percentage points."""
    n, found = 10_000, {}
    for drop in (0.0, 1.0):
        for gained in (0.1, 0.25, 0.5, 1.0):
            outcomes: dict[float, Counter[str]] = {0.25: Counter(), 0.5: Counter()}
            for _ in range(comparisons // 8):
                old = rng.random(n) < 0.9
                u = rng.random(n)
                new = np.where(old, u >= (gained + drop) / 90, u < gained / 10)
                change = paired_drop(new, old)[0]
                for limit, counted in outcomes.items():
                    counted[decide(change, limit)] += 1
            for limit, counted in outcomes.items():
                found[f"drop {drop:g} pp ({gained + drop:g} pp lost, {gained:g} pp won), limit {limit:g} pp"] = shares(counted)
                print(drop, gained, limit, shares(counted), flush=True)
    return found


def live(runs: int, duration: str) -> None:
    """The gate's own re-measurement of an engine against itself, every other time with one core loaded."""
    doc = json.loads(FOUND.read_text()) if FOUND.is_file() else {}
    kept = doc.get("live") or {"duration": duration, "limit": 0.05, "runs": []}
    limits = gate.Limits(max_slowdown=0.05)
    with tempfile.TemporaryDirectory() as scratch:
        engine = model(Path(scratch))
        while len(kept["runs"]) < runs:
            number = len(kept["runs"])
            backend, threads = KINDS[number // 2 % len(KINDS)]
            row = Row("aa", backend, "fp32", 1, "ok", threads=threads)
            start = time.perf_counter()
            with loaded(bool(number % 2)):
                span, blocks = remeasuring.span(duration), remeasuring.BLOCKS[duration][1]
                turns = remeasuring.in_turns(Pair(row, engine, engine), pool(), span, blocks, limits, lambda *_: None)
            reasons = gate.timed(row, turns, limits)
            kept["runs"].append(
                {
                    "backend": backend,
                    "core_busy": bool(number % 2),
                    "load_average": round(os.getloadavg()[0], 1),
                    "seconds": round(time.perf_counter() - start, 1),
                    "reasons": [f"{r.check}: {r.outcome}: {r.message}" for r in reasons],
                    "outcomes": [r.outcome for r in reasons],
                }
            )
            doc["live"] = kept
            write_atomically(FOUND, (json.dumps(doc, indent=1) + "\n").encode())
            print(number + 1, kept["runs"][-1]["outcomes"], kept["runs"][-1]["seconds"], flush=True)


def main() -> None:
    """Runs what was named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "study", "live"))
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--comparisons", type=int, default=12_000)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--duration", default="quick")
    given = parser.parse_args()
    if given.what == "record":
        record(given.sessions)
    elif given.what == "study":
        study(given.comparisons)
    else:
        live(given.runs, given.duration)


if __name__ == "__main__":
    main()
