"""The engines of two runs measured again in one job, in turns: what the gate judges speed, memory and start-up on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deploykit import backends, data, machine, preprocess
from deploykit.artifact import Artifact
from deploykit.errors import DeploykitError, InputError
from deploykit.measurement import Measurement
from deploykit.pipeline import engines
from deploykit.pipeline.measuring import POOL_SIZE
from deploykit.pipeline.request import Narrator
from deploykit.preprocess import Preprocess
from deploykit.report_document import Report, row_id
from deploykit.row import Row
from deploykit.session import OpenRequest
from deploykit.signature import Feeds, ShapeRange
from deploykit.stages import bench
from deploykit.stages import gate as gates

EngineKey = tuple[str, str, str, str]  # model, backend, precision, device
# Launches a block, and how many blocks at most: a row that its interval leaves open is measured on. More and shorter
# launches tell more than few long ones: processes of one engine differ more than rounds of one process do.
BLOCKS: Mapping[str, tuple[int, int]] = {"smoke": (5, 1), "quick": (6, 2), "standard": (10, 3), "mlperf": (20, 2)}
_ASKED = re.compile(r"(.*) \((\S+) asked\)")
_TARGET = re.compile(r"\b(cpu|sm\d+)\)?$")  # of a row's device: 'cpu', 'sm89', 'NVIDIA L4 (sm89)'


@dataclass(frozen=True)
class Again:
    """How the engines are measured again. data: real inputs instead of random ones, as `--data` and `--preprocess` say."""

    duration: str = "standard"
    data: str | None = None
    preprocess: str | None = None


@dataclass(frozen=True)
class Pair:
    """One row's engine in the baseline and now."""

    row: Row
    old: Artifact
    new: Artifact


def by_key(found: Iterable[Artifact]) -> dict[EngineKey, Artifact]:
    """Engines by what a row names them with."""
    return {(str(a.options.get("model")), str(a.options.get("backend")), a.precision, a.device or "cpu"): a for a in found}


def of_folder(folder: Path) -> dict[EngineKey, Artifact]:
    """The engines of a run's folder, their bytes checked; empty where it has none. Raises InputError for a damaged one."""
    return by_key(engines.find(folder / "engines")) if (folder / "engines").is_dir() else {}


def measure(
    new: Report,
    old: Report,
    mine: Mapping[EngineKey, Artifact],
    theirs: Mapping[EngineKey, Artifact],
    limits: gates.LimitSet,
    how: Again,
    narrator: Narrator,
) -> gates.Fresh:
    """By row id of `new`: both engines measured in turns, or why the row was not. Raises InputError for an unknown duration
    and for data that cannot be read."""
    length = span(how.duration)
    found: dict[str, gates.Turns | gates.Settled] = {}
    pairs: list[Pair] = []
    for was, now, _ in gates.pairs_of(new.rows, [r for r in old.rows if not r.is_copy]):
        if now is None or now.status != "ok" or was.status != "ok" or not limits.of(now).timed:
            continue
        pair = _pair(now, _engine(now, mine), _engine(was, theirs))
        if isinstance(pair, Pair):
            pairs.append(pair)
        else:
            found[row_id(now)] = pair
    if pairs:
        narrator.step(f"gate: {len(pairs)} rows, the baseline's engines and these in turns")
    inputs = _Inputs(how, new)
    for number, pair in enumerate(pairs):

        def tell(what: str, share: float, number: int = number) -> None:
            narrator.progress(what, (number + share) / len(pairs))

        feeds = inputs.of(pair)
        found[row_id(pair.row)] = in_turns(pair, feeds, length, BLOCKS[how.duration][1], limits.of(pair.row), tell)
    return found


def in_turns(
    pair: Pair, pool: list[Feeds], span: bench.Duration, blocks: int, limits: gates.Limits, progress: Callable[[str, float], None]
) -> gates.Turns | gates.Settled:
    """The two engines of one row, the baseline's twice, block after block until the interval tells or `blocks` are through."""
    turns: gates.Turns | None = None
    for block in range(blocks):
        found = bench.measure(_targets(pair), {pair.row.batch: pool}, span, progress=progress, seed=block, together=True)
        for name in ("old", "again", "new"):
            item = found[f"{pair.row.label} ({name})"]
            if isinstance(item, DeploykitError):
                outcome, whose = ("fail", "this run's") if name == "new" else ("inconclusive", "the baseline's")
                return gates.Settled(outcome, f"{whose} engine failed while it was measured: {item.message}")
        items = [found[f"{pair.row.label} ({name})"] for name in ("old", "again", "new")]
        part = gates.Turns(*(m for m in items if isinstance(m, Measurement)))
        turns = part if turns is None else _joined(turns, part)
        if not gates.undecided(turns, limits):
            break
    assert turns is not None
    return turns


def _joined(a: gates.Turns, b: gates.Turns) -> gates.Turns:
    return gates.Turns(_more(a.old, b.old), _more(a.again, b.again), _more(a.new, b.new))


def _more(a: Measurement, b: Measurement) -> Measurement:
    return replace(
        a,
        launches=a.launches + b.launches,
        loads_s=a.loads_s + b.loads_s,
        peaks_rss_bytes=a.peaks_rss_bytes + b.peaks_rss_bytes,
        turns=tuple(range(len(a.launches) + len(b.launches))),
    )


def span(name: str) -> bench.Duration:
    """The duration of that name for the gate: as long a row, over as many launches as it needs."""
    span = bench.duration(name)
    launches = BLOCKS[name][0]
    # short windows in turns: what breaks into one of a round's three most often breaks into its neighbours too
    return replace(span, launches=launches, rounds=max(span.rounds, 8), limit_s=span.seconds)


def _targets(pair: Pair) -> Sequence[bench.Target]:
    row = pair.row
    found = []
    for name, engine in (("old", pair.old), ("again", pair.old), ("new", pair.new)):
        ranges = {k: ShapeRange(*(tuple(x) for x in v)) for k, v in dict(engine.options.get("shapes", {})).items()}
        options = backends.opening_options(row.backend, row.streams, row.layout)
        request = OpenRequest(engine.precision, row.batch, row.threads or machine.threads(), ranges, options)
        label = f"{row.label} ({name})"
        found.append(bench.Target(label, row.backend, engine.path, request, row.label, reference=name == "old"))
    return found


def _engine(row: Row, engines: Mapping[EngineKey, Artifact]) -> Artifact | None:
    """The engine of a row: by its name, backend and precision, and where several have these, by the device that the row
    ran on or was built for. None where it cannot be told."""
    asked = _ASKED.fullmatch(row.name)
    name, precision = (asked[1], asked[2]) if asked else (row.name, row.precision)
    found = {key[3]: engine for key, engine in engines.items() if key[:3] == (name, row.backend, precision)}
    if len(found) == 1:
        return next(iter(found.values()))
    target = _TARGET.search(row.device or "cpu")
    return found.get(target[1]) if target else None


def _pair(row: Row, new: Artifact | None, old: Artifact | None) -> Pair | gates.Settled:
    if new is None or old is None:
        whose = " and ".join(name for name, engine in (("this run", new), ("the baseline", old)) if engine is None)
        return gates.Settled("inconclusive", f"no engine of this row to measure again in the folder of {whose}")
    backend = backends.get(row.backend)
    missing = backend.cannot_run()
    if missing is not None:
        return gates.Settled("inconclusive", f"cannot be measured again here: {missing}")
    if _same(new, old):
        return gates.Settled("pass", "the same engine as the baseline's, byte for byte: nothing changed")
    if [(s.name, s.dtype) for s in new.signature.inputs] != [(s.name, s.dtype) for s in old.signature.inputs]:
        return gates.Settled("inconclusive", "its inputs are not the baseline's, so the two cannot be fed the same")
    return Pair(row, old, new)


def _same(a: Artifact, b: Artifact) -> bool:
    """Whether the two are one engine: the same bytes, made of the same, and opened in the same way."""
    shapes = [x.options.get("shapes") for x in (a, b)]
    return (a.sha256, a.companions, a.parent, shapes[0]) == (b.sha256, b.companions, b.parent, shapes[1])


class _Inputs:
    """The pool of inputs of each row: the same ones for both engines, preprocessed as the run's own where nothing else is said."""

    def __init__(self, how: Again, new: Report) -> None:
        self._how = how
        self._own = _preprocess(how, new) if how.data else None

    def of(self, pair: Pair) -> list[Feeds]:
        """`POOL_SIZE` different inputs of the row's batch. Raises DataError for data that cannot be read."""
        batch, signature = pair.row.batch, pair.new.signature
        ranges = {k: ShapeRange(*(tuple(x) for x in v)) for k, v in dict(pair.new.options.get("shapes", {})).items()}
        spec = self._how.data or f"random:{POOL_SIZE * batch}"
        samples = data.open(spec, signature, preprocess=self._own, shapes=ranges)
        wanted = [i % len(samples) for i in range(batch * POOL_SIZE)]
        return [feeds for feeds, _ in samples.take(wanted, "judge").batches(batch, pad=True)]


def _preprocess(how: Again, new: Report) -> Preprocess | None:
    kept = new.samples.get("judge", {}).get("preprocess")
    try:
        return preprocess.chosen(how.preprocess, kept)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise InputError("the preprocessing in the report cannot be read", "say it with --preprocess") from exc


def why_not(new: Report, old: Report, limits: gates.LimitSet, mine: bool, theirs: bool) -> str:
    """Why the two runs' engines are not measured again by themselves; empty when they are."""
    if not limits.timed:
        return "no limit asks for it"
    if not mine or not theirs:
        return "only run folders hold engines"
    here = machine.fingerprint()
    others = {str(r.environment.get("fingerprint") or "not recorded") for r in (new, old)} - {here}
    return "a run was made on another machine" if others else ""
