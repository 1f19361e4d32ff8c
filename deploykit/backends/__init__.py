"""The backends by name. Importing this package, or any backend's module, imports no engine."""

from __future__ import annotations

import importlib

from deploykit.errors import UnknownName
from deploykit.session import Backend

# name -> module; each module exposes BACKEND
MODULES = {
    "torch": "torch_eager",
    "torch-compile": "torch_compile",
    "onnxruntime": "onnx_runtime",
    "openvino": "openvino_cpu",
    "tensorrt-rtx": "tensorrt_rtx",
    "tensorrt": "tensorrt_full",
}


def get(name: str) -> Backend:
    """The backend of that name. Raises UnknownName."""
    if name not in MODULES:
        raise UnknownName("backend", name, MODULES)
    backend: Backend = importlib.import_module(f"deploykit.backends.{MODULES[name]}").BACKEND
    return backend


def names() -> tuple[str, ...]:
    """Every backend's name, in the order of the table's rows."""
    return tuple(MODULES)
