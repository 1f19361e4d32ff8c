"""A finished artifact put where the user asked for it: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from deploykit import artifact as artifacts
from deploykit import scratch
from deploykit.artifact import Artifact, manifest_path
from deploykit.errors import InputError


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """A temporary folder in the file system of `out`, gone afterwards; those that killed processes left there go too. Raises
    InputError where nothing can be written."""
    made_parent = not out.parent.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch.sweep(out.parent)
        making = scratch.folder_in(out.parent)
        folder = making.__enter__()
    except OSError as exc:
        raise InputError(f"cannot write to {out.parent}: {exc.strerror}", "choose another place with -o") from exc
    try:
        yield folder
    finally:
        making.__exit__(None, None, None)
        if made_parent:
            with suppress(OSError):
                out.parent.rmdir()  # only when nothing came into it


def deliver(made: Artifact, out: Path) -> Artifact:
    """Moves an artifact out of its scratch folder to `out`, manifest last, so that a reader never finds half of it."""
    manifest_path(out).unlink(missing_ok=True)
    for name in made.companions:
        os.replace(made.path.parent / name, out.parent / name)
    os.replace(made.path, out)
    return replace(made, path=out).save()


def put_in_place(made: Path, out: Path) -> None:
    """Renames the finished folder `made`, of the same file system, to `out`. An older folder there is removed only once the new
    one stands, and put back where it cannot. Raises OSError."""
    if not out.exists():
        os.rename(made, out)
        return
    with scratch.folder_in(out.parent) as aside:
        old = aside / "old"
        os.rename(out, old)
        try:
            os.rename(made, out)
        except BaseException:
            os.rename(old, out)
            raise


def deliver_engine(made: Artifact, folder: Path) -> Artifact:
    """The finished engine as a folder of its own; an older one of the same name is replaced in one step."""
    made.save()
    if folder.exists() and not any(folder.glob("*.manifest.json")) and any(folder.iterdir()):
        raise InputError(f"{folder} is there already and is no engine of deploykit's", "choose another -o")
    put_in_place(made.path.parent, folder)
    return artifacts.load(folder / made.path.name)
