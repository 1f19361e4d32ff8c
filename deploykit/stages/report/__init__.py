"""report: the Report document as JSON, CSV, Markdown and HTML files, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deploykit.artifact import write_atomically
from deploykit.errors import InputError, OutOfSpace
from deploykit.report_document import MEASUREMENTS_FILE, REPORT_FILE, Report
from deploykit.stages.report import csv_table, html_page, json_document, markdown

_FULL = ("ENOSPC", "EDQUOT")
FORMATS: dict[str, Callable[[Report], str]] = {
    REPORT_FILE: json_document.text,
    "report.csv": csv_table.text,
    "report.md": markdown.text,
    "report.html": html_page.text,
}


def write(report: Report, folder: Path) -> list[Path]:
    """The files of the report in `folder`, each replaced whole or not at all: JSON, CSV, Markdown, HTML, and
    measurements.json with the raw seconds where the report has them.

    All texts are made before the first file is touched. Raises OutOfSpace on a full disk, InputError where the folder
    cannot be written to.
    """
    texts = {name: make(report) for name, make in FORMATS.items()}
    if report.measurements:
        texts[MEASUREMENTS_FILE] = json_document.measurements_text(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise _disk_error(exc, folder) from exc
    paths = [write_text(text, folder / name) for name, text in texts.items()]
    if not report.measurements:
        # raw seconds of an older report must not stand beside this one
        (folder / MEASUREMENTS_FILE).unlink(missing_ok=True)
    return paths


def write_text(text: str, path: Path) -> Path:
    """`path`, holding `text` (UTF-8): written beside it, flushed to the disk and renamed, so that no reader ever sees half
    a file. Raises OutOfSpace on a full disk, InputError where it cannot be written."""
    try:
        write_atomically(path, text.encode())
    except OSError as exc:
        raise _disk_error(exc, path) from exc
    return path


def _disk_error(exc: OSError, path: Path) -> InputError:
    import errno

    if errno.errorcode.get(exc.errno or 0) in _FULL:
        return OutOfSpace(f"no space left on the disk of {path}", "free some space or choose another folder with -o")
    return InputError(f"cannot write {path}: {exc.strerror or exc}", "choose another folder with -o")
