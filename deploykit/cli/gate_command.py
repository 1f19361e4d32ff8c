"""`gate`: the regression check for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploykit.cli import options as o
from deploykit.cli import parsing
from deploykit.cli.options import add
from deploykit.cli.printing import say, show_json
from deploykit.cli.terminal import Bar
from deploykit.errors import EXIT_PASSED, InputError


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    add(app, "gate", gate, "The regression check for CI.")


def gate(
    report_file: Annotated[Path, typer.Argument(metavar="REPORT", help="A run's folder or its report.json.")],
    baseline: o.Baseline = None,
    max_drop: o.MaxDrop = None,
    max_disagreement: o.MaxDisagreement = None,
    max_slowdown: o.MaxSlowdown = None,
    max_size_growth: o.MaxSizeGrowth = None,
    max_memory_growth: o.MaxMemoryGrowth = None,
    max_startup_growth: o.MaxStartupGrowth = None,
    limits: o.LimitsFile = None,
    remeasure: Annotated[
        bool | None,
        typer.Option(
            "--remeasure/--no-remeasure",
            help="Measure both runs' engines again, in turns; default: where both are run folders of this machine.",
            show_default=False,
        ),
    ] = None,
    duration: Annotated[str, typer.Option(help="How long each engine is measured again: quick or standard.")] = "standard",
    data: Annotated[str | None, typer.Option(help="Real samples to measure on; default: random ones.")] = None,
    preprocess: o.Preprocess = None,
    update: Annotated[bool, typer.Option("--update", help="Move the baseline to REPORT, and show what changes.")] = False,
    junit: Annotated[Path | None, typer.Option(help="Write the verdict as JUnit XML.")] = None,
    json_file: o.JsonFile = None,
) -> int:
    """The regression check for CI: 0 passed, 1 failed, 5 inconclusive; never a pass by default.

    A baseline without any limit is held by --max-drop 0.5pp and --max-slowdown 5%.

    Example:  deploykit gate out --baseline base --max-drop 0.5pp --max-slowdown 5%
    """
    from deploykit.pipeline import gating

    asked = (max_drop, max_slowdown, max_size_growth, max_memory_growth, max_startup_growth, max_disagreement)
    if update:
        if baseline is None:
            raise InputError("--update needs the baseline to move", "add --baseline BASE")
        if any(given is not None for given in (*asked, limits, remeasure, data, junit)):
            raise InputError(
                "--update moves the baseline and judges nothing", "leave limits, --remeasure, --data and --junit out"
            )
        written, lines = gating.update(report_file, baseline)
        if json_file is not None:
            show_json({"written": str(written), "changes": lines}, json_file)
        if json_file != "-":
            for line in [*lines, f"the baseline is now {written}"]:
                say(line)
        return EXIT_PASSED
    held = parsing.limits(*asked, limits)
    request = gating.GateRequest(baseline, held, remeasure, gating.Again(duration, data, preprocess))
    gating.check(request, own_machine=False)
    with Bar() as bar:
        verdict = gating.gate(report_file, request, junit, bar)
    if json_file is not None:
        show_json(verdict.to_json(), json_file)
    if json_file != "-":
        for reason in verdict.reasons:
            say(f"{reason.outcome:<13}{reason.row}: {reason.check}: {reason.message}")
        for skipped in verdict.skipped:
            say(f"skipped      {skipped}")
        say(f"verdict: {verdict.outcome}")
    return verdict.exit_code
