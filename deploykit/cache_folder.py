"""Folders for what an engine's runtime makes again when it is gone: kernels compiled for this GPU, a provider's engines."""

from __future__ import annotations

import os
from pathlib import Path


def made(name: str) -> Path | None:
    """The folder `deploykit/<name>` in the user's cache ($XDG_CACHE_HOME, else ~/.cache), made where it is not there; None
    where nothing can be written there."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "deploykit" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None
