"""The command that takes an engine to a device: package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploykit.cli import options as o
from deploykit.cli import parsing
from deploykit.cli.options import add
from deploykit.cli.printing import say
from deploykit.cli.terminal import Bar
from deploykit.errors import EXIT_PASSED


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    add(app, "package", package, "An engine with an example and a check, for a device.")


def package(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine's file or folder, or an .onnx file.")],
    platform: Annotated[str, typer.Option("--for", help="android, ios, linux-arm or linux-x86.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    data: o.Data = None,
    cases: Annotated[int, typer.Option("-n", "--cases", help="How many inputs to keep expected outputs for.")] = 3,
    batch: Annotated[int, typer.Option("--batch", help="The batch the device runs.")] = 1,
    preprocess: o.Preprocess = None,
    classes: o.Classes = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference", help="An engine or .onnx that runs here and says what to expect, for an engine that does not run here."
        ),
    ] = None,
) -> int:
    """A folder with the engine, its preprocessing as data, class names, a short example and expected outputs.

    Example:  deploykit package out/engines/resnet18-executorch-int8 --for android -o resnet18-android
    """
    from deploykit.pipeline import packaging

    parsing.positive(cases, "--cases")
    parsing.positive(batch, "--batch")
    request = packaging.PackageRequest(platform, batch, cases, data, preprocess, classes, reference)
    with Bar() as bar:
        made = packaging.package(engine, request, out, bar)
    say(f"{out}: {len(made.files)} files for {platform}")
    for note in made.notes:
        say(f"note: {note}")
    return EXIT_PASSED
