"""What a builder or a runtime said: errors in order, warnings, and the layer listing, kept by a logger of our own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

# A machine without a driver: every error is followed by lines like these, which hide the cause.
_NOISE = re.compile(
    r"cudaError|CUDA (initialization|lib).*fail|Error Code 6: API Usage Error \(CUDA|CUDA error|\bcudaGet|"
    r"CUDA driver version is insufficient|no CUDA-capable device|Network must have at least one output",
    re.IGNORECASE,
)
# Of no consequence: the scales of a quantized convolution are kept in float32 within the layer, and integer inputs are
# bound as what they are.
_ROUTINE = re.compile(
    r"Converting (conv|gemm|matmul|fc)?\s*(activation|weight) scales to fp32|Make sure (input|output) .* has Int64 binding",
    re.IGNORECASE,
)


@dataclass
class Heard:
    """Messages by severity. `listing` holds the layers as DETAILED verbosity prints them."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    listing: list[str] = field(default_factory=list)

    def hear(self, severity: str, message: str) -> None:
        """Keeps what matters of one message; VERBOSE chatter is dropped at once (thousands of lines a build)."""
        if severity in ("INTERNAL_ERROR", "ERROR"):
            self.errors.append(message)
        elif severity == "WARNING":
            self.warnings.append(message)
        elif "LayerType: " in message:
            self.listing.append(message)

    def first_error(self) -> str | None:
        """The first error that is no consequence of having no GPU; the very first where there is no other."""
        for message in self.errors:
            if not _NOISE.search(message):
                return _shorter(message)
        return _shorter(self.errors[0]) if self.errors else None

    def notable_warnings(self) -> tuple[str, ...]:
        """Warnings once each, without the routine ones."""
        kept = [_shorter(w) for w in self.warnings if not _ROUTINE.search(w) and not _NOISE.search(w)]
        return tuple(dict.fromkeys(kept))


_recorders: dict[Any, Any] = {}


def recorder(trt: Any) -> tuple[Any, Heard]:
    """A logger of `trt` and what it hears from now on.

    One logger a process and module, each call with a new `Heard`: TensorRT ignores a second logger while a builder or
    runtime with the first is alive (a caught exception can hold one), and a logger must outlive them.
    """
    if trt.ILogger not in _recorders:

        class Recorder(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # super() alone leaves the C++ half unmade
                self.heard = Heard()

            def log(self, severity: Any, message: str) -> None:
                self.heard.hear(severity.name, message)

        _recorders[trt.ILogger] = Recorder()
        if hasattr(trt, "init_libnvinfer_plugins"):  # the parser makes InstanceNormalization and others of TensorRT's own plugins
            trt.init_libnvinfer_plugins(_recorders[trt.ILogger], "")
    logger = _recorders[trt.ILogger]
    logger.heard = Heard()
    return logger, logger.heard


def _shorter(message: str) -> str:
    """One line, without the builder's own source positions."""
    text = re.sub(r"\s+", " ", message).strip()
    text = re.sub(r"\s*In [\w:]+ at /_src/\S+", "", text)
    text = re.sub(r"^IBuilder::\w+: ", "", text)
    return text if len(text) <= 600 else text[:600] + " ..."
