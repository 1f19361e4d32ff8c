"""Baselines: a run's folder, or one JSON file a machine class that a repository can keep."""

from __future__ import annotations

import base64
import binascii
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
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

OUTCOMES = "outcomes"


@dataclass(frozen=True)
class Run:
    """One side of a gate: the report, the per-sample outcomes by row id, and the run's folder where there is one."""

    report: Report
    outcomes: gates.Outcomes = field(default_factory=dict)
    folder: Path | None = None
    file: Path | None = None


def open_run(path: Path) -> Run:
    """A run from its folder or its report.json. Raises InputError."""
    report = report_document.load(path)
    folder = path if path.is_dir() else path.parent
    kept = folder if (folder / report_document.REPORT_FILE).is_file() else None
    return Run(
        report, gates.outcomes_of(drifts_of(path, report)), kept, path / report_document.REPORT_FILE if path.is_dir() else path
    )


def open_baseline(path: Path, environment: Mapping[str, Any]) -> Run:
    """The baseline at `path`: a run's folder, a report.json, a baseline file, or the one for the machine class of `environment`
    in a folder of them. Raises InputError where there is none."""
    if path.is_dir() and not (path / report_document.REPORT_FILE).is_file():
        path = _of_class(path, environment)
    if path.is_dir():
        return open_run(path)
    report = report_document.load(path)
    found = _packed(path)
    if found is None:
        return Run(report, gates.outcomes_of(drifts_of(path, report)), None, path)
    return Run(report, _unpacked(found, path), None, path)


def drifts_of(path: Path, report: Report) -> dict[str, Drift]:
    """Per-sample outcomes kept beside a report, by row id; empty for a lone report.json."""
    folder = (path if path.is_dir() else path.parent) / OUTCOMES
    found: dict[str, Drift] = {}
    for key, doc in report.drifts.items() if folder.is_dir() else ():
        name = doc.get("outcomes")
        if isinstance(name, str) and Path(name).name == name and (folder / name).is_file():
            found[key] = Drift.from_json(doc).with_outcomes(folder / name)
    return found


def class_of(environment: Mapping[str, Any]) -> str:
    """The machine class of a report. Raises InputError where its machine is not recorded."""
    try:
        return machine.machine_class(environment)
    except KeyError as exc:
        raise InputError("the report does not say on which machine it was made", "make it anew with `deploykit run`") from exc


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


def target_of(baseline: Path, report: Report) -> Path:
    """What `--update` writes: the file or the run's folder given, or the file of the report's machine class in a folder."""
    if baseline.suffix == ".json" or (baseline / report_document.REPORT_FILE).is_file():
        return baseline
    if baseline.exists() and not baseline.is_dir():
        raise InputError(f"{baseline} is neither a .json file nor a folder", "give the baseline's file or folder")
    return baseline / f"{class_of(report.environment)}.json"


def update(run: Run, baseline: Path) -> tuple[Path, list[str]]:
    """Moves the baseline to `run`; returns what was written, and the change row by row.

    A file holds the report and, packed, the per-sample outcomes; a run's folder is replaced by a copy of the run's. Both
    appear whole or not at all. Raises InputError for a report that was edited by hand or has nothing measured.
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
    return target, changes(before, run.report)


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


def _replace_folder(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        raise InputError(f"{target} is the run itself", "give another folder as the baseline")
    scratch.sweep(target.parent)
    with scratch.folder_in(target.parent) as making:
        shutil.copytree(source, making / "new", ignore=shutil.ignore_patterns(f"{scratch.PREFIX}*"))
        put_in_place(making / "new", target)


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
        except (KeyError, TypeError, ValueError, binascii.Error) as exc:
            raise InputError(f"{path}: the outcomes of row '{key}' cannot be read ({exc})", "make the baseline anew") from exc
    return found


def changes(before: Report | None, after: Report) -> list[str]:
    """What moving the baseline changes, a line a row."""
    old = {row_id(r): r for r in before.rows if not gates.is_copy(r)} if before is not None else {}
    new = {row_id(r): r for r in after.rows if not gates.is_copy(r)}
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
