"""Which packages are here and in which version, without importing any of them."""

from __future__ import annotations

import importlib.metadata

from deploykit.children import has_module
from deploykit.session import Missing


def version(*distributions: str) -> str | None:
    """The version of the first of those distributions that is installed; None when none is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def versions(*distributions: str) -> dict[str, str]:
    """Name and version of those of the distributions that are installed."""
    return {name: found for name in distributions if (found := version(name)) is not None}


def missing(module: str, extra: str) -> Missing | None:
    """Why `module` cannot be imported, with the command that adds it; None when it can."""
    if has_module(module):
        return None
    return Missing(f"the package '{module}' is not installed", f"pip install 'deploykit[{extra}]'")


def only_cpu(backend: str, target: str) -> Missing | None:
    """Why a CPU backend builds nothing for `target`; None for 'cpu'."""
    if target == "cpu":
        return None
    return Missing(f"{backend} engines of deploykit are for the CPU, not for {target}", "use --backend tensorrt-rtx or tensorrt")
