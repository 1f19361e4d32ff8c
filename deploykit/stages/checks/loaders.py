"""What the engines' own loaders say of a model: OpenVINO's reader and TensorRT-RTX's parser, each in a child process.

Lists of supported operators age; the loader of the installed version doesn't.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deploykit import children
from deploykit.errors import BackendFailed, ChildDied, MissingBackend
from deploykit.stages.checks.codes import Hit
from deploykit.stages.checks.structure import one_line

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Refusal:
    """One complaint of a loader; node is '' when it names none."""

    node: str
    message: str


def openvino(path: Path) -> Iterator[Hit]:
    """DK061 when OpenVINO's reader refuses the model, DK065 when it could not be asked."""
    if not children.has_module("openvino"):
        yield Hit("DK065", detail="openvino is not installed", target="openvino", remedy="pip install 'deploykit[openvino]'")
        return
    yield from _ask("OpenVINO (checks)", _read_openvino, path, "DK061", "openvino")


def tensorrt(path: Path, target: str) -> Iterator[Hit]:
    """DK062 (tensorrt-rtx) or DK063 (tensorrt) when TensorRT-RTX's parser refuses the model; DK065 when it is not here.

    Full TensorRT cannot be had without its GPU libraries; its parser is of the same source, so RTX's answer is a warning.
    """
    if not children.has_module("tensorrt_rtx"):
        yield Hit("DK065", detail="tensorrt-rtx is not installed", target=target, remedy="pip install 'deploykit[rtx]'")
        return
    code = "DK062" if target == "tensorrt-rtx" else "DK063"
    yield from _ask("TensorRT-RTX (checks)", _parse_rtx, path, code, target)


def _ask(name: str, reader: Callable[[str], list[Refusal]], path: Path, code: str, target: str) -> Iterator[Hit]:
    """`code` for each refusal and for a loader that the model crashed; DK065 when it gave no answer in time."""
    try:
        refusals = children.run(name, reader, str(path), timeout_s=TIMEOUT_S)
    except ChildDied as exc:
        refusals = [Refusal("", one_line(str(exc)))]
    except (BackendFailed, MissingBackend) as exc:
        yield Hit("DK065", detail=one_line(exc.message), target=target, remedy=exc.remedy or "")
        return
    for refusal in refusals:
        yield Hit(code, refusal.node, refusal.message, target)


def _read_openvino(path: str) -> list[Refusal]:
    try:
        import openvino
    except ImportError as exc:
        raise MissingBackend(f"openvino cannot be imported: {exc}", "pip install 'deploykit[openvino]'") from exc
    try:
        openvino.Core().read_model(path)
    except RuntimeError as exc:
        return [Refusal("", one_line(str(exc)))]
    return []


def _parse_rtx(path: str) -> list[Refusal]:
    try:
        import tensorrt_rtx as trt
    except ImportError as exc:
        raise MissingBackend(f"tensorrt_rtx cannot be imported: {exc}", "pip install 'deploykit[rtx]'") from exc

    class Quiet(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            """Nothing: the parser keeps its errors."""

    logger = Quiet()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(path) and network.num_layers:
        return []
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return [Refusal(e.node_name(), f"{e.node_operator()}: {_reason(e)}") for e in errors] or [
        Refusal("", "no layer could be read")
    ]


def _reason(error: object) -> str:
    """The parser's words, without the CUDA errors that follow each one on a machine without a GPU."""
    text = " ".join(line for line in error.desc().splitlines() if "cudaError" not in line)  # type: ignore[attr-defined]
    if "Plugin not found" in text:
        return "neither an operator nor a plugin of that name is known"
    return one_line(text if text.strip() not in ("", "false") else f"not supported ({error.code().name})")  # type: ignore[attr-defined]
