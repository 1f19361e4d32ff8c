"""AOTInductor packages: a PyTorch module compiled ahead of time for inputs of one shape, and opened again in a third of a second.

Source of the method: PyTorch's `torch.export` and `torch._inductor.aoti_compile_and_package`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.backends import opened
from deploykit.errors import BackendFailed, DeploykitError

if TYPE_CHECKING:
    import torch


def compile_to(path: Path, step: torch.nn.Module, inputs: tuple[torch.Tensor, ...], compiler: str | None, *, bf16: bool) -> None:
    """Writes `step`, called with `inputs` by position, as a package (.pt2) of kernels for this CPU and tensors of those shapes; with
    `bf16` under autocast. It runs on as many threads as torch has when it is called.

    Freezing makes weights constants and packs them for the kernels: BF16 autocast 10.1 ms with it, 15.3 without, and 15.3
    with the weights cast to BF16 instead; FP32 26.0 and 26.8 ms (ResNet-18, batch 1, 2 cores of Zen 4, torch 2.14.1, compiled when
    opened). The number of threads read at run time costs nothing against one that is compiled in (0.996 to 1.005 of it); a batch that
    is left open costs 30 % at batch 1 (ResNet-18 FP32; MobileNetV2 BF16 37 %), so there is a package for each batch.

    Raises BackendFailed when PyTorch cannot trace or compile the module.
    """
    import torch
    import torch._inductor.config as inductor

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".inductor-") as folder:
        settings = {
            "freezing": True,
            "cpp.dynamic_threads": True,
            "cpp.cxx": (None, compiler),
            "aot_inductor.output_path": f"{folder}{os.sep}",
        }
        with _failures(), inductor.patch(settings), torch.no_grad():
            program = torch.export.export(_step(step, bf16=bf16), inputs, strict=False)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def just_in_time(
    step: torch.nn.Module, inputs: tuple[torch.Tensor, ...], compiler: str | None, *, bf16: bool
) -> Callable[..., Any]:
    """`step` by `torch.compile` in this process alone, for what `compile_to` refuses: its graphs may hold what torch.export cannot
    carry into a package (operators in place, as in Keras's layers). Raises BackendFailed when that fails too."""
    import torch
    import torch._inductor.config as inductor

    with _failures(), inductor.patch({"freezing": True, "cpp.cxx": (None, compiler)}), torch.inference_mode():
        compiled: Callable[..., Any] = torch.compile(_step(step, bf16=bf16), dynamic=False)
        for _ in range(2):
            compiled(*inputs)
    return compiled


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Whatever PyTorch raises while it traces and compiles, as a BackendFailed."""
    try:
        yield
    except DeploykitError:
        raise
    except Exception as exc:
        raise BackendFailed(
            f"torch.compile failed: {type(exc).__name__}: {opened.first_line(exc)}", "leave torch-compile out for this model"
        ) from exc


def _step(model: torch.nn.Module, *, bf16: bool) -> torch.nn.Module:
    """`model`, under BF16 autocast where that is asked for."""
    import torch

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return self.model(*tensors)

    return Step().eval()


def load(path: Path) -> Callable[..., Any]:
    """What a package computes, called with tensors by position. Raises BackendFailed for a file that is no package.

    PyTorch unpacks it into a folder in $TMPDIR that is left behind when the process is killed; so into one of ours, which goes at
    once: what the process has mapped stays.
    """
    import torch

    try:
        with tempfile.TemporaryDirectory(prefix="deploykit-") as folder, _temporary_files_in(folder):
            loaded: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
    except Exception as exc:
        raise BackendFailed(
            f"PyTorch cannot open {path.name}: {type(exc).__name__}: {opened.first_line(exc)}", "build the engine again"
        ) from exc
    return loaded


@contextlib.contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """$TMPDIR is `folder`, for native code too."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
