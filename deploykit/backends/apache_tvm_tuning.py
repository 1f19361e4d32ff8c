"""The search for better schedules, with a budget of time: TVM's meta-schedule, round by round on the task that costs most.

Everything measured goes at once into a database in a folder, and is found there again by the next search: one that was
killed goes on where it was. Our default schedule of each task is measured first and is in the database too.
`apache_tvm_choice` then decides, in turns, which of the two goes into the library.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploykit import cache_folder, children
from deploykit.backends import apache_tvm_choice, apache_tvm_schedule, installed
from deploykit.backends.apache_tvm_choice import mean_s, workers
from deploykit.backends.apache_tvm_compile import Machine, failures
from deploykit.errors import BackendFailed, InputError, MissingBackend
from deploykit.session import Missing

_TRIALS_A_ROUND = 16
_DEFAULTS_AT_ONCE = 8  # compiled by one worker, which takes seconds to start
_CHOICE_SHARE = 0.15  # of the budget, at most, for the comparison at its end
_CHOICE_S = 2.0  # and at most for each function
_WORKER_TIMEOUT_S = 240.0  # TVM's own 30 s are not enough for its worker to start on a busy machine
_DATABASE = ("database_workload.json", "database_tuning_record.json")
CURVE = "curve.jsonl"


@dataclass
class Tasks:
    """The functions of a graph to search for: modules, how often each is called, best seconds and rounds so far."""

    names: list[str]
    modules: list[Any]
    weights: list[int]
    best_s: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)

    @property
    def total_s(self) -> float:
        """Seconds of one run as the sum of its functions' best times."""
        return sum(weight * best for weight, best in zip(self.weights, self.best_s, strict=True))

    def next(self) -> int | None:
        """The task whose share of a run, divided by the rounds it already had, is largest; None when no task takes time,
        so that a search has nothing to find."""
        shares = [w * b / (1 + r) for w, b, r in zip(self.weights, self.best_s, self.rounds, strict=True)]
        return max(range(len(shares)), key=shares.__getitem__) if any(share > 0 for share in shares) else None


def missing() -> Missing | None:
    """What a search needs beside TVM; None when it is here."""
    for module in ("xgboost", "psutil"):
        lacking = installed.missing(module, "tvm")
        if lacking is not None:
            wheel = "xgboost-cpu" if module == "xgboost" else module
            return Missing(f"tuning needs the package '{module}', and it is not installed", f"pip install {wheel}")
    return None


def database_folder(machine: Machine, threads: int) -> Path:
    """Where what was measured on this CPU, with this TVM and as many threads, is kept. Raises InputError without a cache."""
    version = installed.version("apache-tvm") or "none"
    folder = cache_folder.made(f"tvm-{version}-{machine.cpu or machine.triple}-{threads}-threads")
    if folder is None:
        raise InputError("there is no cache folder to keep the tuning database in", "set XDG_CACHE_HOME to a folder")
    return folder


def mend(folder: Path) -> int:
    """Cuts off a last line that a killed search left unfinished; returns how many bytes that were."""
    cut = 0
    for name in _DATABASE:
        path = folder / name
        if path.is_file():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            cut += len(data) - whole
            if whole < len(data):
                path.write_bytes(data[:whole])
    return cut


def search(
    module: Any, machine: Machine, threads: int, seconds: float, folder: Path, scratch: Path
) -> tuple[dict[str, Any], Any]:
    """Searches, measuring on this CPU, and applies what was found; what was measured is in `folder`. `seconds` are for both: no
    round is begun that would not end in time, by the one before. A graph of which nothing can be tuned ends it at once. `scratch`: a folder
    for what the search compiles, empty again afterwards.

    Returns what the manifest says of it, and the module with the faster schedule of each function: seconds, rounds, candidates
    measured, the curve [(seconds, estimated seconds of one run)], and how many functions have a searched schedule.
    Raises MissingBackend without xgboost, BackendFailed.
    """
    lacking = missing()
    if lacking is not None:
        raise MissingBackend(lacking.why, lacking.remedy)
    from tvm.s_tir import meta_schedule as ms

    start = time.perf_counter()
    target = machine.target(threads)
    mend(folder)
    with failures("TVM's search failed"), target, workers(threads, scratch):
        database = ms.database.JSONDatabase(work_dir=str(folder))
        before = len(database)
        found = ms.relax_integration.extract_tasks(module, target)
        tasks = Tasks([t.task_name for t in found], [t.dispatched[0] for t in found], [int(t.weight) for t in found])
        choice_s = min(_CHOICE_SHARE * seconds, _CHOICE_S * len(tasks.names))
        curve = _rounds(tasks, Bench(database, target, folder), machine, start, seconds - choice_s)
        left = max(choice_s, seconds - (time.perf_counter() - start))
        scheduled, counts = apache_tvm_choice.applied(module, machine, threads, database, left)
    facts = {
        "seconds": time.perf_counter() - start,
        "asked_s": seconds,
        "tasks": len(tasks.names),
        "rounds": sum(tasks.rounds),
        "measured": len(database) - before,
        "functions": counts,
        "curve": [[round(t, 2), total] for t, total in curve],
    }
    return facts, scheduled


def _rounds(tasks: Tasks, bench: Bench, machine: Machine, start: float, seconds: float) -> list[tuple[float, float]]:
    """Default schedules, then round after round of candidates until `seconds` after `start`; returns the curve."""
    from tvm.s_tir import meta_schedule as ms

    bench.take_defaults(tasks, machine, start + seconds)
    curve = [(time.perf_counter() - start, tasks.total_s)]
    _keep(bench.folder, curve[-1], "default schedules")
    model = ms.cost_model.XGBModel(num_tuning_cores=1)
    round_s = 0.0
    while (passed := time.perf_counter() - start) + round_s < seconds:
        chosen = tasks.next()
        if chosen is None:
            break
        children.report_progress(f"tune: {tasks.names[chosen]}, {tasks.total_s * 1e3:.2f} ms a run so far", passed / seconds)
        bench.take_round(tasks, chosen, model)
        curve.append((time.perf_counter() - start, tasks.total_s))
        round_s = curve[-1][0] - passed
        _keep(bench.folder, curve[-1], tasks.names[chosen])
    return curve


def candidate(module: Any, target: Any, _: Any) -> Any:
    """One candidate compiled, in a worker of TVM's builder: what its own `default_build` does, without its import of the tensor
    intrinsics of every GPU, whose parsing takes a minute of CPU in each new worker (TVM 0.26), and there is one a round."""
    from tvm import driver, s_tir

    return driver.build(s_tir.transform.RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module), target=target)


def fastest(library: Any, device: Any, config: Any, arguments: Any) -> list[float]:
    """The least of a candidate's repeats, in a worker of TVM's runner: what else the machine does only adds to a time."""
    from tvm.s_tir.meta_schedule.runner.utils import run_evaluator_common

    return [min(run_evaluator_common(library, device, config, arguments))]


class Bench:
    """TVM's workers, which compile and time candidates, and the database that takes what they find."""

    def __init__(self, database: Any, target: Any, folder: Path) -> None:
        from tvm.s_tir import meta_schedule as ms

        self._database, self._target, self.folder = database, target, folder
        self._builder = ms.builder.LocalBuilder(max_workers=1, timeout_sec=_WORKER_TIMEOUT_S, f_build=candidate)
        config = ms.runner.EvaluatorConfig(number=1, repeat=4, min_repeat_ms=20)
        self._runner = ms.runner.LocalRunner(timeout_sec=_WORKER_TIMEOUT_S, evaluator_config=config, f_run_evaluator=fastest)

    def take_defaults(self, tasks: Tasks, machine: Machine, until: float) -> None:
        """Fills in the best seconds that the database knows for each task, our default schedule of each measured into it. After
        `until` no more are begun: what is left has no time, and no search."""
        tasks.best_s = [self._best_s(module) for module in tasks.modules]
        tasks.rounds = [0] * len(tasks.names)
        # None: a function of no loops that can be scheduled, for which no search can do anything either
        ours = [
            None if best > 0 else apache_tvm_schedule.of_function(module["main"], machine.registers)
            for best, module in zip(tasks.best_s, tasks.modules, strict=True)
        ]
        wanted = [at for at, schedule in enumerate(ours) if schedule is not None]
        for first in range(0, len(wanted), _DEFAULTS_AT_ONCE):
            if time.perf_counter() >= until:
                return
            part = wanted[first : first + _DEFAULTS_AT_ONCE]
            children.report_progress(f"tune: default schedules, {first} of {len(wanted)}", 0.0)
            for at, seconds in zip(part, self._times([(tasks.modules[at], ours[at]) for at in part]), strict=True):
                tasks.best_s[at] = seconds

    def _best_s(self, module: Any) -> float:
        """What the database knows as a task's best; 0 for nothing."""
        known = self._database.get_top_k(self._database.commit_workload(module), 1)
        return mean_s(known[0]) if known else 0.0

    def _times(self, scheduled: list[tuple[Any, Any]]) -> list[float]:
        """Seconds of each (function, schedule of it), which are in the database afterwards. Raises BackendFailed."""
        from tvm.s_tir import meta_schedule as ms

        found = []
        built = self._builder.build([ms.builder.BuilderInput(schedule.mod, self._target) for _, schedule in scheduled])
        for (module, schedule), each in zip(scheduled, built, strict=True):
            if each.error_msg:
                raise BackendFailed(f"TVM's search cannot build a candidate: {_last_line(each.error_msg)}")
            arguments = ms.arg_info.ArgInfo.from_prim_func(module["main"])
            ran = self._runner.run([ms.runner.RunnerInput(each.artifact_path, "cpu", arguments)])[0].result()
            if ran.error_msg or not ran.run_secs:
                raise BackendFailed(f"TVM's search cannot run a candidate: {_last_line(ran.error_msg)}")
            workload = self._database.commit_workload(module)
            record = ms.database.TuningRecord(schedule.trace, workload, ran.run_secs, self._target, arguments)
            self._database.commit_tuning_record(record)
            found.append(mean_s(record))
        return found

    def take_round(self, tasks: Tasks, at: int, model: Any) -> None:
        """One round of candidates for one task; its best time and its count are brought up to date."""
        from tvm.s_tir import meta_schedule as ms

        (self.folder / "logs").mkdir(exist_ok=True)
        context = ms.TuneContext(
            mod=tasks.modules[at],
            target=self._target,
            space_generator="post-order-apply",
            # smaller than TVM's own populations: what a round computes before it measures anything took 70 s of CPU time at 128 and 3
            search_strategy=ms.search_strategy.EvolutionarySearch(
                population_size=64, init_min_unmeasured=16, genetic_num_iters=2, max_fail_count=3
            ),
            task_name=tasks.names[at],
            num_threads=1,
        ).clone()
        ms.tune_tasks(
            tasks=[context],
            task_weights=[1.0],
            work_dir=str(self.folder),
            max_trials_global=_TRIALS_A_ROUND,
            num_trials_per_iter=_TRIALS_A_ROUND,
            builder=self._builder,
            runner=self._runner,
            database=self._database,
            cost_model=model,
        )
        tasks.rounds[at] += 1
        tasks.best_s[at] = self._best_s(tasks.modules[at]) or tasks.best_s[at]


def _last_line(text: object) -> str:
    """The end of a worker's traceback: what was raised there."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def _keep(folder: Path, point: tuple[float, float], what: str) -> None:
    """Adds a line to the log of all searches in this folder."""
    line = {"at": time.strftime("%Y-%m-%dT%H:%M:%S"), "seconds": round(point[0], 2), "run_s": point[1], "task": what}
    with (folder / CURVE).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
