"""The end of the line: the files a run leaves in its folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from deploykit import report_document
from deploykit import scratch as scratches
from deploykit.artifact import Artifact, manifest_path
from deploykit.drift import Drift
from deploykit.errors import InputError, OutOfSpace
from deploykit.pipeline import scenarios
from deploykit.pipeline.gating import OUTCOMES, measured_outcomes
from deploykit.pipeline.line import LineResult
from deploykit.pipeline.request import Narrator
from deploykit.report_document import Report
from deploykit.stages import report as reports

ENGINES = "engines"
LOGS = "loadgen"


def check_folder(out: Path) -> None:
    """Raises InputError when `out` cannot be a run's folder, before anything is spent on the run; makes nothing."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise InputError(f"{there if there != out.absolute() else out} is a file", "choose a folder with -o")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as exc:
        raise InputError(f"cannot write to {out}: {exc.strerror}", "choose another folder with -o") from exc


@contextlib.contextmanager
def held(out: Path, store: Path) -> Iterator[None]:
    """Holds the run's folder for this run alone, and clears away what killed runs left in it.

    Raises InputError when `out` cannot be a run's folder, when another run is writing into it, and when its engines would
    lie in the store, whose folders are not a run's to replace.
    """
    check_folder(out)
    there, kept = out.resolve(), store.resolve()
    if kept.is_relative_to(there / ENGINES) or there.is_relative_to(kept):
        raise InputError(
            f"a run in {out} keeps its engines in {out / ENGINES}, and the store is {store}",
            "choose another folder with -o (example: -o out), or another store with --store",
        )
    try:
        holding = scratches.held(out)
        holding.__enter__()
    except OSError as exc:
        raise _cannot_write(out, exc) from exc
    try:
        scratches.sweep(out)
        yield
    finally:
        holding.__exit__(None, None, None)


def deliver(report: Report, result: LineResult, out: Path, narrator: Narrator) -> list[Path]:
    """Writes the report's files, the per-sample outcomes and the engines into `out`; returns the report's files.

    All is written in a scratch folder inside `out` first, so that a full disk leaves an older run there as it was. Then file after
    file is renamed, under a mark that lets no reader take the two runs' files for one, should this process be killed meanwhile.
    """
    narrator.step(f"write {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with scratches.folder_in(out) as scratch:
            drifts = _write_outcomes(report, measured_outcomes(result), scratch / OUTCOMES)
            wanted = _copy_engines(result, out / ENGINES, scratch / ENGINES)
            files = reports.write(replace(report, drifts=drifts), scratch)
            scenarios.write_logs(result.loads, scratch / LOGS)
            unfinished = out / report_document.UNFINISHED_FILE
            unfinished.touch()
            shutil.rmtree(out / OUTCOMES, ignore_errors=True)
            if (scratch / OUTCOMES).is_dir():
                os.rename(scratch / OUTCOMES, out / OUTCOMES)
            shutil.rmtree(out / LOGS, ignore_errors=True)
            if (scratch / LOGS).is_dir():
                os.rename(scratch / LOGS, out / LOGS)
            _swap_engines(scratch / ENGINES, out / ENGINES, wanted)
            for file in files:
                os.replace(file, out / file.name)
            if not report.measurements:
                # raw seconds of an older report must not stand beside this one
                (out / report_document.MEASUREMENTS_FILE).unlink(missing_ok=True)
            unfinished.unlink()
    except (OSError, OutOfSpace) as exc:
        raise _cannot_write(out, exc) from exc
    return [out / file.name for file in files]


def _cannot_write(out: Path, exc: OSError | OutOfSpace) -> InputError:
    if isinstance(exc, OutOfSpace) or exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(f"no space left on the disk of {out}", "free some space or choose another folder with -o")
    return InputError(f"cannot write to {out}: {exc.strerror or exc}", "choose another folder with -o")


def write_logs(result: LineResult, folder: Path) -> None:
    """LoadGen's own files in `folder`, a folder a row. Raises InputError where it cannot be written to."""
    try:
        scenarios.write_logs(result.loads, folder)
    except OSError as exc:
        raise _cannot_write(folder, exc) from exc


def _write_outcomes(report: Report, outcomes: Mapping[str, Drift], folder: Path) -> dict[str, dict[str, object]]:
    """Writes the per-sample outcomes into `folder`; returns the report's drifts, each with its file's name."""
    drifts: dict[str, dict[str, object]] = {key: dict(doc) for key, doc in report.drifts.items()}
    if outcomes:
        folder.mkdir(parents=True)
    written: dict[int, str] = {}
    for key, drift in outcomes.items():
        if id(drift) not in written:
            written[id(drift)] = f"{len(written):03d}.npz"
            drift.save_outcomes(folder / written[id(drift)])
        if key in drifts:
            drifts[key]["outcomes"] = written[id(drift)]
    return drifts


def _copy_engines(result: LineResult, there: Path, scratch: Path) -> set[str]:
    """Real copies in `scratch` of this run's engines that do not lie in `there` unchanged, one folder each; returns the
    names of all of them."""
    wanted: dict[str, Artifact] = {}
    for engine in result.built:
        if not engine.options.get("backend"):
            continue
        parts = [str(engine.options.get("model", "model")), str(engine.options["backend"]), engine.precision]
        if engine.device not in ("", "cpu"):
            parts.append(engine.device)
        wanted["-".join(parts).replace("/", "_").replace("#", "-")] = engine
    for name, engine in wanted.items():
        if _same(engine, there / name / engine.path.name):
            continue
        (scratch / name).mkdir(parents=True)
        for file in (engine.path, manifest_path(engine.path), *(engine.path.parent / c for c in engine.companions)):
            shutil.copy2(file, scratch / name / file.name)
    return set(wanted)


def _swap_engines(scratch: Path, folder: Path, wanted: Collection[str]) -> None:
    """Moves the finished engines from `scratch` into `folder`; engines of an older run that this one has not are removed."""
    for made in sorted(scratch.iterdir()) if scratch.is_dir() else ():
        folder.mkdir(exist_ok=True)
        if (folder / made.name).exists():
            shutil.rmtree(folder / made.name)
        os.rename(made, folder / made.name)
    for old in folder.iterdir() if folder.is_dir() else ():
        if old.is_dir() and old.name not in wanted and any(old.glob("*.manifest.json")):
            shutil.rmtree(old)


def _same(engine: Artifact, target: Path) -> bool:
    side = manifest_path(target)
    if not target.is_file() or not side.is_file() or side.read_bytes() != manifest_path(engine.path).read_bytes():
        return False
    return (
        all((target.parent / name).is_file() for name in engine.companions)
        and target.stat().st_size == engine.path.stat().st_size
    )


def render_again(folder: Path) -> tuple[Report, list[Path]]:
    """A finished run's report, its .md, .csv and .html written anew."""
    report = report_document.load(folder)
    if not folder.is_dir() and folder.name != report_document.REPORT_FILE:
        raise InputError(f"{folder} is not a run's folder or its report.json", "give the folder that `deploykit run -o` wrote")
    return report, reports.write(report, folder if folder.is_dir() else folder.parent)


def two_reports(before: Path, after: Path) -> tuple[Report, Report]:
    """Two finished runs."""
    return report_document.load(before), report_document.load(after)


def write_comparison(before: Report, after: Report, file: Path) -> Path:
    """Two runs beside each other as Markdown. Raises InputError where it cannot be written."""
    from deploykit.stages.report import compare

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return reports.write_text(compare.markdown(before, after), file)
    except OSError as exc:
        raise InputError(f"cannot write {file}: {exc.strerror}", "choose another place for --markdown") from exc


def write_files(report: Report, csv: Path | None, markdown: Path | None, html: Path | None) -> list[Path]:
    """The report in each format that a file was named for."""
    from deploykit.stages.report import csv_table, html_page
    from deploykit.stages.report import markdown as markdown_text

    written: list[Path] = []
    for path, text in ((csv, csv_table.text), (markdown, markdown_text.text), (html, html_page.text)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append(reports.write_text(text(report), path))
    return written
