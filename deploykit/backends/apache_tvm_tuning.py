"""The search for better schedules, with a budget of time: TVM's meta-schedule, round by round on the task that costs most.

Everything measured goes at once into a database in a folder, and is found there again by the next search: one that was
killed goes on where it was. Our default schedule of each task is measured first and is in the database too, so that a
search never ends with a slower one, by its own measurements.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploykit import cache_folder, children
from deploykit.backends import apache_tvm_schedule, installed
from deploykit.backends.apache_tvm_compile import Machine, failures
from deploykit.errors import BackendFailed, InputError, MissingBackend
from deploykit.session import Missing

_TRIALS_A_ROUND = 16
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


def search(module: Any, machine: Machine, threads: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Searches for up to `seconds` (the round in hand is finished), measuring on this CPU; what is found is in `folder`.
    A graph of which nothing can be tuned ends it at once.

    Returns what the manifest says of it: seconds, rounds, candidates measured, and the curve [(seconds, estimated seconds
    of one run)]. Raises MissingBackend without xgboost, BackendFailed.
    """
    lacking = missing()
    if lacking is not None:
        raise MissingBackend(lacking.why, lacking.remedy)
    from tvm.s_tir import meta_schedule as ms

    start = time.perf_counter()
    target = machine.target(threads)
    mend(folder)
    with failures("TVM's search failed"), target:
        database = ms.database.JSONDatabase(work_dir=str(folder))
        found = ms.relax_integration.extract_tasks(module, target)
        tasks = Tasks([t.task_name for t in found], [t.dispatched[0] for t in found], [int(t.weight) for t in found])
        builder = ms.builder.LocalBuilder(max_workers=1, timeout_sec=_WORKER_TIMEOUT_S, f_build=candidate)
        config = ms.runner.EvaluatorConfig(number=1, repeat=3, min_repeat_ms=20)
        runner = ms.runner.LocalRunner(timeout_sec=_WORKER_TIMEOUT_S, evaluator_config=config)
        before = len(database)
        for at, each in enumerate(tasks.modules):
            children.report_progress(f"tune: the default schedule of {tasks.names[at]}", 0.0)
            tasks.best_s.append(_measured_default(each, database, builder, runner, target, machine))
            tasks.rounds.append(0)
        curve = [(time.perf_counter() - start, tasks.total_s)]
        _keep(folder, curve[-1], "default schedules")
        model = ms.cost_model.XGBModel(num_tuning_cores=1)
        while (passed := time.perf_counter() - start) < seconds:
            chosen = tasks.next()
            if chosen is None:
                break
            at = chosen
            children.report_progress(f"tune: {tasks.names[at]}, {tasks.total_s * 1e3:.2f} ms a run so far", passed / seconds)
            _round(tasks, at, database, builder, runner, model, target, folder)
            curve.append((time.perf_counter() - start, tasks.total_s))
            _keep(folder, curve[-1], tasks.names[at])
    return {
        "seconds": time.perf_counter() - start,
        "asked_s": seconds,
        "tasks": len(tasks.names),
        "rounds": sum(tasks.rounds),
        "measured": len(database) - before,
        "curve": [[round(t, 2), total] for t, total in curve],
    }


def applied(module: Any, machine: Machine, threads: int, folder: Path) -> Any:
    """The module with the best schedule of the database on each function that is in it. Raises BackendFailed."""
    from tvm import relax

    mend(folder)
    with failures("TVM cannot apply its tuning database"), machine.target(threads):
        return relax.transform.MetaScheduleApplyDatabase(str(folder))(module)


def candidate(module: Any, target: Any, _: Any) -> Any:
    """One candidate compiled, in a worker of TVM's builder: what its own `default_build` does, without its import of the tensor
    intrinsics of every GPU, whose parsing takes a minute of CPU in each new worker (TVM 0.26), and there is one a round."""
    from tvm import driver, s_tir

    return driver.build(s_tir.transform.RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module), target=target)


def _measured_default(module: Any, database: Any, builder: Any, runner: Any, target: Any, machine: Machine) -> float:
    """The best seconds that the database knows for a task, after our default schedule has been measured into it."""
    from tvm.s_tir import meta_schedule as ms

    workload = database.commit_workload(module)
    known = database.get_top_k(workload, 1)
    if known:
        return _seconds(known[0])
    schedule = apache_tvm_schedule.of_function(module["main"], machine.registers)
    if schedule is None:
        return 0.0  # a function of no loops that can be scheduled: no search can do anything for it either
    built = builder.build([ms.builder.BuilderInput(schedule.mod, target)])[0]
    if built.error_msg:
        raise BackendFailed(f"TVM's search cannot build a candidate: {_last_line(built.error_msg)}")
    arguments = ms.arg_info.ArgInfo.from_prim_func(module["main"])
    ran = runner.run([ms.runner.RunnerInput(built.artifact_path, "cpu", arguments)])[0].result()
    if ran.error_msg or not ran.run_secs:
        raise BackendFailed(f"TVM's search cannot run a candidate: {_last_line(ran.error_msg)}")
    database.commit_tuning_record(ms.database.TuningRecord(schedule.trace, workload, ran.run_secs, target, arguments))
    return _seconds(database.get_top_k(workload, 1)[0])


def _round(tasks: Tasks, at: int, database: Any, builder: Any, runner: Any, model: Any, target: Any, folder: Path) -> None:
    """One round of candidates for one task; its best time and its count are brought up to date."""
    from tvm.s_tir import meta_schedule as ms

    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    context = ms.TuneContext(
        mod=tasks.modules[at],
        target=target,
        space_generator="post-order-apply",
        search_strategy=ms.search_strategy.EvolutionarySearch(
            population_size=128, init_min_unmeasured=16, genetic_num_iters=3, max_fail_count=3
        ),
        task_name=tasks.names[at],
        num_threads=1,
    ).clone()
    ms.tune_tasks(
        tasks=[context],
        task_weights=[1.0],
        work_dir=str(folder),
        max_trials_global=_TRIALS_A_ROUND,
        num_trials_per_iter=_TRIALS_A_ROUND,
        builder=builder,
        runner=runner,
        database=database,
        cost_model=model,
    )
    tasks.rounds[at] += 1
    known = database.get_top_k(database.commit_workload(tasks.modules[at]), 1)
    if known:
        tasks.best_s[at] = _seconds(known[0])


def _last_line(text: object) -> str:
    """The end of a worker's traceback: what was raised there."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def _seconds(record: Any) -> float:
    """The mean of a record's repeats: what meta-schedule itself ranks by."""
    times = [float(s) for s in record.run_secs]
    return sum(times) / len(times)


def _keep(folder: Path, point: tuple[float, float], what: str) -> None:
    """Adds a line to the log of all searches in this folder."""
    line = {"at": time.strftime("%Y-%m-%dT%H:%M:%S"), "seconds": round(point[0], 2), "run_s": point[1], "task": what}
    with (folder / CURVE).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
