"""Baselines: a run's folder, or one JSON file a machine class that a repository can keep."""

from __future__ import annotations

import base64
import binascii
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifact as artifacts
from deploykit import machine, report_document, scratch
from deploykit.drift import Drift
from deploykit.errors import InputError
from deploykit.pipeline.delivered import put_in_place
from deploykit.report_document import Report, row_id
from deploykit.row import Row
from deploykit.stages import gate as gates
from deploykit.stages import report as reports

OUTCOMES = "outcomes"


@dataclass(frozen=True)
class Run:
    """One side of a gate: the report, the per-sample outcomes by row id, and the run's folder where there is one."""

    report: Report
    outcomes: gates.Outcomes = field(default_factory=dict)
    folder: Path | None = None
    file: Path | None = None


def open_run(path: Path) -> Run:
    """A run from its folder, its report.json or a baseline file. Raises InputError."""
    if not path.is_dir():
        return replace(_open_file(path), folder=_folder_of(path))
    report = report_document.load(path)
    return Run(report, gates.outcomes_of(drifts_of(path, report)), path, path / report_document.REPORT_FILE)


def _open_file(path: Path) -> Run:
    report = report_document.load(path)
    packed = _packed(path)
    outcomes = gates.outcomes_of(drifts_of(path, report)) if packed is None else _unpacked(packed, path)
    return Run(report, outcomes, None, path)


def _folder_of(path: Path) -> Path | None:
    """The run's folder that a report belongs to; None for a file of another name: what lies beside it is another run's."""
    if path.is_dir():
        return path
    return path.parent if path.name == report_document.REPORT_FILE else None


def open_baseline(path: Path, environment: Mapping[str, Any]) -> Run:
    """The baseline at `path`: a run's folder, a report.json, a baseline file, or the one for the machine class of `environment`
    in a folder of them. Raises InputError where there is none."""
    if path.is_dir() and not (path / report_document.REPORT_FILE).is_file():
        path = _of_class(path, environment)
    return open_run(path) if path.is_dir() else _open_file(path)


def drifts_of(path: Path, report: Report) -> dict[str, Drift]:
    """Per-sample outcomes kept beside a report, by row id; empty for a lone report.json."""
    kept = _folder_of(path)
    found: dict[str, Drift] = {}
    if kept is None:
        return found
    folder = kept / OUTCOMES
    for key, doc in report.drifts.items() if folder.is_dir() else ():
        name = doc.get("outcomes")
        if isinstance(name, str) and Path(name).name == name and (folder / name).is_file():
            found[key] = Drift.from_json(doc).with_outcomes(folder / name)
    return found


def class_of(environment: Mapping[str, Any]) -> str:
    """The machine class of a report, which is part of a file's name. Raises InputError where its machine is not recorded, or
    not as `machine.describe` would."""
    try:
        found = machine.machine_class(environment)
    except KeyError as exc:
        raise InputError("the report does not say on which machine it was made", "make it anew with `deploykit run`") from exc
    if re.fullmatch(r"[a-z0-9-]+", found) is None:
        raise InputError(f"the report's machine is no machine class: {found!r}", "make it anew with `deploykit run`")
    return found


def _of_class(folder: Path, environment: Mapping[str, Any]) -> Path:
    wanted = class_of(environment)
    if (folder / f"{wanted}.json").is_file():
        return folder / f"{wanted}.json"
    there = sorted(p.stem for p in folder.glob("*.json"))
    has = f"it has {', '.join(there)}" if there else "it has none"
    raise InputError(
        f"{folder} holds no baseline for this machine class, {wanted}; {has}",
        f"make one on purpose: deploykit gate REPORT --baseline {folder} --update",
    )


def is_of(baseline: Path, folder: Path) -> bool:
    """Whether the baseline is the run's folder `folder`, or its report.json."""
    kept = _folder_of(baseline)
    return kept is not None and kept.resolve() == folder.resolve() and (folder / report_document.REPORT_FILE).is_file()


def target_of(baseline: Path, report: Report) -> Path:
    """What `--update` writes: the file or the run's folder given (by its report.json, too: a new one must not stand beside an old
    run's engines), or the file of the report's machine class in a folder."""
    if baseline.name == report_document.REPORT_FILE and any((baseline.parent / name).exists() for name in _OF_ONE_RUN):
        return baseline.parent
    if baseline.suffix == ".json" or (baseline / report_document.REPORT_FILE).is_file():
        return baseline
    if baseline.exists() and not baseline.is_dir():
        raise InputError(f"{baseline} is neither a .json file nor a folder", "give the baseline's file or folder")
    return baseline / f"{class_of(report.environment)}.json"


def update(run: Run, baseline: Path) -> tuple[Path, list[str]]:
    """Moves the baseline to `run`; returns what was written, and the change row by row.

    A file holds the report and, packed, the per-sample outcomes; a run's folder is replaced by a copy of the run's. Both
    appear whole or not at all. Raises InputError for a report that was edited by hand or has nothing measured, and for a
    folder that holds what is no run's, or that another run is writing into.
    """
    if run.report.wrong_checksum:
        raise InputError(f"{run.file} was edited after it was written", "make it anew with `deploykit run`")
    if not any(row.status in ("ok", "built") for row in run.report.rows):
        raise InputError(f"{run.file} has no row that ran or was built", "a baseline of nothing would pass nothing")
    target = target_of(baseline, run.report)
    before = report_document.load(target) if target.exists() else None
    if target.suffix == ".json":
        artifacts.write_atomically(target, _text(run).encode())
    else:
        if run.folder is None:
            raise InputError(f"{target} is a run's folder", "give the report as a run's folder too")
        _replace_folder(run.folder, target)
    return target, [*changed_runs(before, run.report), *changes(before, run.report)]


def _text(run: Run) -> str:
    doc = run.report.to_json()
    doc[OUTCOMES] = {
        key: {
            "samples": one.samples,
            "n": len(one.correct),
            "correct": base64.b64encode(np.packbits(one.correct).tobytes()).decode(),
        }
        for key, one in sorted(run.outcomes.items())
    }
    doc["checksum"] = report_document.checksum(doc)
    return json.dumps(doc, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


# What a run leaves in its folder, and what the GitHub Action writes beside it.
_RUNS = frozenset((*reports.FORMATS, report_document.MEASUREMENTS_FILE, OUTCOMES, "engines", "loadgen"))
_BESIDE = frozenset(("gate.xml", "gate.txt"))
_OF_ONE_RUN = (report_document.MEASUREMENTS_FILE, OUTCOMES, "engines")


def _replace_folder(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        raise InputError(f"{target} is the run itself", "give another folder as the baseline")
    if source.resolve().is_relative_to(target.resolve()):
        raise InputError(f"{target} holds the run, and would be replaced", "give another folder as the baseline")
    with scratch.held(source), scratch.held(target):
        scratch.sweep(target)
        foreign = sorted(p.name for p in target.iterdir() if p.name not in _RUNS | _BESIDE)
        if foreign:
            said = foreign[0] + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
            remedy = "give the baseline a folder of its own"
            raise InputError(f"{target} holds {said}, which is no run's, and would be replaced", remedy)
        there = target.resolve()
        scratch.sweep(there.parent)
        with scratch.folder_in(there.parent) as making:
            (making / "new").mkdir()
            for name in sorted(_RUNS):
                if (source / name).is_dir():
                    shutil.copytree(source / name, making / "new" / name)
                elif (source / name).is_file():
                    shutil.copy2(source / name, making / "new" / name)
            put_in_place(making / "new", there)


def _packed(path: Path) -> Mapping[str, Any] | None:
    doc = json.loads(path.read_text(encoding="utf-8"))  # `load` has read it already
    found = doc.get(OUTCOMES)
    return found if isinstance(found, dict) else None


def _unpacked(packed: Mapping[str, Any], path: Path) -> dict[str, gates.RowOutcomes]:
    found = {}
    for key, one in packed.items():
        try:
            bits = np.frombuffer(base64.b64decode(one["correct"], validate=True), dtype=np.uint8)
            n = int(one["n"])
            if len(bits) != -(-n // 8):
                raise ValueError(f"{len(bits)} bytes for {n} samples")
            found[key] = gates.RowOutcomes(str(one["samples"]), np.unpackbits(bits, count=n).astype(np.bool_))
        except (KeyError, TypeError, ValueError, OverflowError, binascii.Error) as exc:
            raise InputError(f"{path}: the outcomes of row '{key}' cannot be read ({exc})", "make the baseline anew") from exc
    return found


def changed_runs(before: Report | None, after: Report) -> list[str]:
    """What moving the baseline changes beside its rows, and what speaks against it, a line each."""
    said = []
    if after.verdict is not None and after.verdict.outcome != "pass":
        said.append(f"note     the run's own gate said {after.verdict.outcome}")
    if before is None:
        return said
    facts = (
        ("model", [str(r.model.get("digest") or r.model.get("sha256") or "not recorded")[:12] for r in (before, after)]),
        ("samples", [str(r.samples.get("judge", {}).get("digest") or "none")[:12] for r in (before, after)]),
        ("machine", [str(r.environment.get("fingerprint") or "not recorded") for r in (before, after)]),
        ("reference", [" ".join(map(str, r.reference.values())) or "none" for r in (before, after)]),
    )
    said += [f"changed  {name}: {was} -> {now}" for name, (was, now) in facts if was != now]
    for name in sorted({*before.versions, *after.versions}):
        was, now = (r.versions.get(name, "not there") for r in (before, after))
        if was != now:
            said.append(f"changed  {name}: {was} -> {now}")
    return said


def changes(before: Report | None, after: Report) -> list[str]:
    """What moving the baseline changes, a line a row."""
    old = {row_id(r): r for r in before.rows if not r.is_copy} if before is not None else {}
    new = {row_id(r): r for r in after.rows if not r.is_copy}
    said = [f"gone     {r.label} ({r.status})" for key, r in old.items() if key not in new]
    for key, row in new.items():
        if key not in old:
            said.append(f"new      {row.label}: {_figures(None, row)}")
        elif (line := _figures(old[key], row)) != _figures(old[key], old[key]):
            said.append(f"changed  {row.label}: {line}")
        else:
            said.append(f"same     {row.label}")
    return said


def _figures(was: Row | None, now: Row) -> str:
    def arrow(name: str, form: str, scale: float = 1.0) -> str:
        values = [getattr(r, name) for r in (was, now) if r is not None]
        shown = ["-" if v is None else form.format(scale * v) for v in values]
        return shown[-1] if len(set(shown)) == 1 else " -> ".join(shown)

    states = list(dict.fromkeys(r.status for r in (was, now) if r is not None))
    parts = [" -> ".join(states)] if states != ["ok"] else []
    parts += [f"{arrow('images_per_s', '{:.4g}')} images/s", f"speed-up {arrow('speedup', '{:.2f}')}"]
    if any(r is not None and r.top1 is not None for r in (was, now)):
        parts.append(f"top-1 {arrow('top1', '{:.2f}', 100.0)} %")
    parts.append(f"{arrow('size_bytes', '{:,.0f}')} bytes")
    return ", ".join(parts)
