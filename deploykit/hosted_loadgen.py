"""LoadGen in a measuring child: it sends the queries, the open session answers them.

Samples lie in memory, one a feed, before the clock starts (the rules' untimed LoadSamplesToRam). At batch 1 each has its
inputs bound beforehand; at larger ones the samples of a run are put together within the timed region, since LoadGen chooses
them anew for every query.
"""

from __future__ import annotations

import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import hosted, loadgen
from deploykit.children import report_progress
from deploykit.errors import MissingBackend
from deploykit.loadgen import LoadOutcome, LoadRequest
from deploykit.session import Session
from deploykit.signature import Feeds

PROBE_S = 1.0  # each step of Server's search
PROBE_QUERIES = 700  # early stopping needs 459 for a 99th percentile without any query over the bound, 662 with one
CLOSE = 1.03  # the search ends when the rate that fails is this close to the one that holds
STEP_BACK = 0.93  # a rate that held in the search and fails over the whole duration is lowered by this
PROBE_MOST_S = 20.0  # where so many queries take longer, the search goes by the 99th percentile of those it had
HOLD_MOST_S = 120.0  # the same for the run at the rate that the search found, where that is longer than was asked for
_MOST_PROBES = 12
RETRIES = 5
_MOST_QUERIES = 20_000_000  # LoadGen keeps every prepared query in memory
_SEED = 1  # the same queries in every run
_SUMMARY, _DETAIL = "mlperf_log_summary.txt", "mlperf_log_detail.txt"


def run(request: LoadRequest, samples: list[Feeds], batch: int) -> LoadOutcome:
    """LoadGen's outcome for the session that is open in this process. `samples`: feeds of one sample each.

    Raises MissingBackend without LoadGen, and BackendFailed when the engine fails or LoadGen gives no result.
    """
    _module()
    sut = _Sut(hosted.open_session(), samples, batch)
    sut.warm_up()
    if request.scenario == "Server":
        return _highest_rate(request, sut)
    if request.scenario == "Offline":
        return _offline(request, sut)
    return _once(request, sut, {})


def _module() -> Any:
    try:
        import mlperf_loadgen
    except ImportError as exc:
        raise MissingBackend("MLPerf's LoadGen is not installed", "pip install 'deploykit[loadgen]'") from exc
    return mlperf_loadgen


def worst_s(request: LoadRequest) -> float:
    """The most seconds that `run` may take beside its warm-up: every probe and retry in full, each twice as long as was asked
    for (what waits when the time is up is answered still), with one more run of the bound's length."""
    once = request.seconds + 1.0
    if request.scenario != "Server":
        return 2 * RETRIES * once
    probes = _MOST_PROBES * (PROBE_MOST_S + request.latency_s)
    held = RETRIES * (max(once, HOLD_MOST_S) + request.latency_s)
    return 2 * (RETRIES * (PROBE_S + request.latency_s) + probes + held)


class _Sut:
    """The system under test: answers queries with the open session, a batch at a time."""

    def __init__(self, session: Session, samples: Sequence[Feeds], batch: int) -> None:
        self.session, self.samples, self.batch = session, samples, batch
        self.streams = max(1, getattr(session, "streams", 1))
        self.failed: Exception | None = None
        self.run_s = 0.0  # of the fastest run
        self.mean_s = 0.0
        # by lane: calls of one lane never run at once, those of several do
        lanes = range(self.streams) if batch == 1 else ()
        self._bound: list[list[Callable[[], object]]] = [[session.bind(feeds) for feeds in samples] for _ in lanes]
        self._axes = {spec.name: session.signature.batch_axis(spec) for spec in session.signature.inputs}

    def warm_up(self) -> None:
        """At least ten runs and 200 ms; keeps the seconds of the fastest and of the mean run."""
        spent: list[float] = []
        end = time.perf_counter() + hosted.WARMUP_S
        while len(spent) < hosted.WARMUP_RUNS or time.perf_counter() < end:
            start = time.perf_counter()
            self.answer([(len(spent) + i) % len(self.samples) for i in range(self.batch)])
            spent.append(time.perf_counter() - start)
        self.run_s, self.mean_s = min(spent), sum(spent) / len(spent)

    def answer(self, indices: Sequence[int], lane: int = 0) -> None:
        """Runs the samples of those indices, at most a batch of them; a short batch is filled up with its last one."""
        if self.batch == 1:
            self._bound[lane][indices[0]]()
            return
        chosen = [self.samples[i] for i in [*indices, *[indices[-1]] * (self.batch - len(indices))]]
        feeds: dict[str, Any] = {}
        for name, axis in self._axes.items():
            first = chosen[0][name]
            feeds[name] = first if axis is None else np.concatenate([s[name] for s in chosen], axis=axis)
        self.session.infer(feeds)


def _once(request: LoadRequest, sut: _Sut, extra: dict[str, float]) -> LoadOutcome:
    """One run of LoadGen; `extra`: settings of its scenario beside those set here."""
    lg = _module()
    settings = _settings(lg, request, sut)
    for name, value in extra.items():
        setattr(settings, name, type(getattr(settings, name))(value))
    complete = _completer(lg)
    workers = _Workers(sut, complete) if request.scenario == "Server" or sut.streams > 1 else None

    def issue(queries: list[Any]) -> None:
        if workers is not None:
            workers.put(queries)
            return
        for start in range(0, len(queries), sut.batch):
            _answer(sut, queries[start : start + sut.batch], complete)

    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        logging = lg.LogSettings()
        logging.enable_trace = False
        output = lg.LogOutputSettings()
        output.outdir = folder
        logging.log_output = output
        # LoadGen reads audit.config from the working directory: a name that is not there
        audit = str(Path(folder) / "no-audit.config")
        system = lg.ConstructSUT(issue, _nothing)
        library = lg.ConstructQSL(len(sut.samples), len(sut.samples), _nothing_loaded, _nothing_loaded)
        try:
            lg.StartTestWithLogSettings(system, library, settings, logging, audit)
        finally:
            if workers is not None:
                workers.close()
            lg.DestroyQSL(library)
            lg.DestroySUT(system)
        if sut.failed is not None:
            raise sut.failed
        logs = {f.name: f.read_text(errors="replace") for f in sorted(Path(folder).iterdir()) if f.name in (_SUMMARY, _DETAIL)}
    said = {"batch": float(sut.batch), "streams": float(sut.streams), "samples": float(len(sut.samples)), **extra}
    if request.scenario == "Server":
        said["latency_s"] = request.latency_s
    return loadgen.outcome(request, logs.get(_DETAIL, ""), said, logs)


def _settings(lg: Any, request: LoadRequest, sut: _Sut) -> Any:
    """LoadGen prepares as many queries as its expected latency or rate suggests, and ends when they are used up; so the
    expectation lies beyond what the warm-up reached, or a run would end before its time."""
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, request.scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = round(request.seconds * 1e3)
    settings.min_query_count = 1
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = _SEED
    if request.scenario == "SingleStream":
        settings.single_stream_expected_latency_ns = round(max(sut.run_s * 0.8, request.seconds / _MOST_QUERIES) * 1e9)
    elif request.scenario == "MultiStream":
        runs = -(-loadgen.SAMPLES_PER_QUERY // (sut.batch * sut.streams))
        settings.multi_stream_samples_per_query = loadgen.SAMPLES_PER_QUERY
        settings.multi_stream_expected_latency_ns = round(max(sut.run_s * 0.8 * runs, request.seconds / _MOST_QUERIES) * 1e9)
    elif request.scenario == "Server":
        settings.server_target_latency_ns = round(request.latency_s * 1e9)
        settings.server_target_latency_percentile = 0.99
    return settings


def _offline(request: LoadRequest, sut: _Sut) -> LoadOutcome:
    """Offline is one query, of as many samples as are expected to fill the duration: where they did not, once more with more."""
    rate = sut.streams * sut.batch / sut.mean_s
    for _ in range(RETRIES):
        found = _once(request, sut, {"offline_expected_qps": rate})
        if found.valid or found.value is None:
            break
        rate = max(1.3 * rate, 1.1 * found.value)
    return found


def _highest_rate(request: LoadRequest, sut: _Sut) -> LoadOutcome:
    """The outcome at the highest rate that keeps the bound: bracketed, halved, then held for the whole duration.

    Raises what a failing engine raises. Where no rate keeps the bound, in the search or over the whole duration, `value` is None;
    the logs are those of the last run all the same.
    """
    if sut.run_s > request.latency_s:
        why = f"one run takes {sut.run_s * 1e3:.3g} ms at the least, so that every rate missed {request.latency_s * 1e3:g} ms"
        return _no_rate(request, sut, why, (), None)
    report_progress("Server: what the engine can do at all", 0.0)
    most = 1.1 * (_offline(LoadRequest("Offline", PROBE_S / 2), sut).value or sut.batch / sut.mean_s)
    tried: list[tuple[float, bool]] = []
    last: LoadOutcome | None = None

    def holds(rate: float) -> bool:
        nonlocal last
        seconds = min(max(PROBE_S, PROBE_QUERIES / rate), PROBE_MOST_S)
        report_progress(f"Server: {rate:.4g} samples/s", min(0.5, 0.08 * len(tried)))
        last = _once(LoadRequest("Server", seconds, request.latency_s), sut, {"server_target_qps": rate})
        tried.append((rate, last.valid or _held_so_far(last, rate)))
        return tried[-1][1]

    low, high = 0.0, most
    rate = 0.7 * most
    while high > CLOSE * low and len(tried) < _MOST_PROBES:
        if low == 0.0 and len(tried) > 6:
            break  # not even a fiftieth of what the engine can do
        if holds(rate):
            low = rate
        else:
            high = rate
        rate = (low + high) / 2 if low else high / 2
    rate = low
    for _ in range(RETRIES if low else 0):
        report_progress(f"Server: {rate:.4g} samples/s over {request.seconds:g} s", 0.6)
        # a run that is too short for its percentile is INVALID whatever the engine does
        seconds = max(request.seconds, min(PROBE_QUERIES / rate, HOLD_MOST_S))
        last = _once(LoadRequest("Server", seconds, request.latency_s), sut, {"server_target_qps": rate})
        tried.append((rate, last.valid))
        if last.valid or _held_so_far(last, rate):
            return LoadOutcome.from_json({**last.to_json(), "tried": tried}, last.logs)
        rate *= STEP_BACK
    lowest, bound = min(tried)[0], f"{request.latency_s * 1e3:g} ms"
    if low:
        why = f"{low:.3g} samples/s kept {bound} in the search, and over a longer run even {tried[-1][0]:.3g} missed it"
    else:
        why = f"even {lowest:.3g} samples/s missed {bound}; one run takes {sut.run_s * 1e3:.3g} ms"
    return _no_rate(request, sut, why, tuple(tried), last.logs if last is not None else None)


def _held_so_far(found: LoadOutcome, rate: float) -> bool:
    """Whether a run that was cut short of PROBE_QUERIES, and so INVALID whatever the engine does, kept the bound."""
    tail = found.percentiles_s.get("p99")
    return found.seconds * rate < PROBE_QUERIES * 0.999 and tail is not None and tail <= found.settings["latency_s"]


def _no_rate(
    request: LoadRequest, sut: _Sut, why: str, tried: tuple[tuple[float, bool], ...], logs: Mapping[str, str] | None
) -> LoadOutcome:
    settings = {"batch": float(sut.batch), "latency_s": request.latency_s}
    return LoadOutcome("Server", None, "samples/s", False, request.seconds, 0, {}, (why,), settings, tried, logs)


class _Workers:
    """Threads that answer queries as they come, as many as the session runs at once, each a batch of what is waiting."""

    def __init__(self, sut: _Sut, complete: Callable[[Sequence[Any]], None]) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sut, self._complete = sut, complete
        self._threads = [threading.Thread(target=self._serve, args=(lane,), daemon=True) for lane in range(sut.streams)]
        for thread in self._threads:
            thread.start()

    def put(self, queries: Sequence[Any]) -> None:
        """Queues the samples of a query; returns at once."""
        for query in queries:
            self._queue.put(query)

    def close(self) -> None:
        """Ends the threads, once all is answered."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self, lane: int) -> None:
        while (first := self._queue.get()) is not None:
            taken = [first]
            while len(taken) < self._sut.batch:
                try:
                    following = self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._queue.put(None)
                    break
                taken.append(following)
            _answer(self._sut, taken, self._complete, lane)


def _answer(sut: _Sut, queries: Sequence[Any], complete: Callable[[Sequence[Any]], None], lane: int = 0) -> None:
    """Runs and completes queries. After a failure the rest is completed unanswered: LoadGen cannot be stopped, and its result
    is thrown away."""
    if sut.failed is None:
        try:
            sut.answer([query.index for query in queries], lane)
        except Exception as exc:
            sut.failed = exc
    complete(queries)


def _completer(lg: Any) -> Callable[[Sequence[Any]], None]:
    response, done = lg.QuerySampleResponse, lg.QuerySamplesComplete

    def complete(queries: Sequence[Any]) -> None:
        done([response(query.id, 0, 0) for query in queries])

    return complete


def _nothing() -> None:
    """LoadGen flushes; nothing is held back."""


def _nothing_loaded(_: list[int]) -> None:
    """The samples lie in memory already."""
