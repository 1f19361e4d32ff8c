"""From our ONNX graph to a library that TVM's virtual machine runs: imported, laid out, fused, scheduled, compiled.

Convolutions are laid out NHWC: channels innermost are the vector axis of `apache_tvm_schedule` and of meta-schedule's tiles.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import graph
from deploykit.backends import apache_tvm_schedule, opened
from deploykit.backends.apache_tvm_schedule import Registers
from deploykit.errors import BackendFailed, ModelError
from deploykit.session import Missing
from deploykit.signature import Signature

ARM = "linux-arm64"
_ARM_COMPILER = "aarch64-linux-gnu-g++"
_LAYOUT = {"relax.nn.conv2d": ["NHWC", "HWIO"]}


@dataclass(frozen=True)
class Machine:
    """What code is generated for: LLVM's triple and CPU ('' where the triple's baseline is meant), vector registers, linker."""

    name: str
    triple: str
    cpu: str
    features: tuple[str, ...]
    registers: Registers
    linker: str

    def target(self, threads: int) -> Any:
        """TVM's description of it; `threads` is what a search shares work among."""
        import tvm

        spec: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "num-cores": threads}
        if self.cpu:
            spec["mcpu"] = self.cpu
        if self.features:
            spec["mattr"] = list(self.features)
        return tvm.target.Target(spec)


def import_without_torch() -> None:
    """Imports TVM as it is where PyTorch is not installed. tvm_ffi imports PyTorch wherever it can, for tensors that it could then
    take: 3.5 s of CPU and its memory, which the row would count as TVM's (apache-tvm-ffi 0.1.13)."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment] # what Python itself takes for 'not to be found'
    try:
        import tvm.relax  # noqa: F401
    finally:
        if hidden:
            del sys.modules["torch"]


def here() -> Machine:
    """The CPU this process runs on, as LLVM names it."""
    import_without_torch()
    from tvm.target import codegen

    target = codegen.llvm_get_system_triple()
    cpu = str(codegen.llvm_get_system_cpu())
    probe = Machine("cpu", str(target), cpu, (), Registers(4, 24), linker() or "g++").target(1)
    if codegen.llvm_cpu_has_features("avx512f", probe):
        registers = Registers(16, 24)
    elif codegen.llvm_cpu_has_features("avx2", probe):
        registers = Registers(8, 12)
    else:
        registers = Registers(4, 12 if "x86" in str(target) else 24)
    return Machine("cpu", str(target), cpu, (), registers, linker() or "g++")


def arm() -> Machine:
    """Any 64-bit ARM that runs Linux: ARMv8-A with NEON."""
    return Machine(ARM, "aarch64-linux-gnu", "", ("+neon",), Registers(4, 24), _ARM_COMPILER)


def linker() -> str | None:
    """The C++ compiler that links the library; None where there is none."""
    return next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def no_linker(target: str) -> Missing | None:
    """Why the library of a target cannot be linked here, with the package that changes it; None when it can."""
    if target == ARM:
        if shutil.which(_ARM_COMPILER):
            return None
        return Missing(
            f"cross-compiling for {ARM} needs {_ARM_COMPILER}, and it is not installed", "apt-get install g++-aarch64-linux-gnu"
        )
    if linker():
        return None
    return Missing("TVM needs a C++ compiler to link a library, and there is none", "apt-get install g++")


def imported(path: Path, signature: Signature, batch: int | None) -> Any:
    """The graph as a Relax module: its batch a symbol, or `batch` where that is given.

    Raises ModelError for a file that is no model, BackendFailed naming the operators that TVM's front end lacks.
    """
    from tvm.relax.frontend.onnx import from_onnx

    model = graph.load(path)
    shapes: dict[str, list[Any]] | None = None
    if batch is not None:
        shapes = {}
        for value in model.graph.input:
            dims = value.type.tensor_type.shape.dim
            sizes = [batch if d.dim_param == signature.batch_symbol else (d.dim_param or d.dim_value) for d in dims]
            if all(isinstance(size, int) for size in sizes):
                shapes[value.name] = sizes
    lacking = _lacking(model)
    if lacking:
        raise BackendFailed(
            f"TVM's ONNX front end has no converter for {', '.join(lacking)}", "use --backend onnxruntime for this model"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return from_onnx(model, shape_dict=shapes, dtype_dict=None if shapes is None else _dtypes(signature))
    except Exception as exc:  # the front end raises whatever its converters do
        raise BackendFailed(
            f"TVM's ONNX front end cannot convert {path.name}: {opened.first_line(exc)}",
            "use --backend onnxruntime for this model",
        ) from exc


def _dtypes(signature: Signature) -> dict[str, str]:
    return {spec.name: spec.dtype for spec in signature.inputs}


def _lacking(model: Any) -> list[str]:
    """The graph's operators that the front end does not know, each with a node that has it."""
    from tvm.relax.frontend.onnx import onnx_frontend

    known = {*onnx_frontend._get_convert_map(), "If", "Constant"}
    nodes = {node.op_type: node.name for node in reversed(model.graph.node) if node.op_type not in known}
    return [f"{kind} (node '{name}')" for kind, name in sorted(nodes.items())]


def lowered(module: Any, target: Any) -> Any:
    """The module as calls of fused loop functions, none of them scheduled. Raises BackendFailed."""
    import tvm
    from tvm.relax import get_pipeline, transform

    passes = [
        transform.DecomposeOpsForInference(),
        transform.CanonicalizeBindings(),
        transform.FoldConstant(),
        transform.ConvertLayout(_LAYOUT),
        transform.Normalize(),
        transform.FoldConstant(),
        transform.CanonicalizeBindings(),
        get_pipeline("zero"),
    ]
    with failures("TVM cannot lower the graph"), target:
        return tvm.transform.Sequential(passes)(module)


def library(module: Any, machine: Machine, threads: int, path: Path) -> tuple[str, ...]:
    """Writes the shared library of a lowered module, every function scheduled; returns the names of functions that stayed
    plain loops. Raises BackendFailed."""
    from tvm import relax

    target = machine.target(threads)
    with failures("TVM cannot compile the graph"), target:
        scheduled, plain = apache_tvm_schedule.apply(module, machine.registers)
        executable = relax.build(scheduled, target)
    link(executable, machine, path)
    return plain


def link(executable: Any, machine: Machine, path: Path) -> None:
    """Writes an executable of TVM as a shared library, its parts in a folder that is gone afterwards. Raises BackendFailed."""
    from tvm.support import cc

    parts = path.with_name(f".{path.name}.parts")
    parts.mkdir()
    try:
        with failures(f"{machine.linker} cannot link the library"):
            executable.export_library(str(path), fcompile=cc.cross_compiler(machine.linker), workspace_dir=str(parts))
    finally:
        shutil.rmtree(parts, ignore_errors=True)


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Turns what TVM raises inside into BackendFailed with `what` and the sentence of TVM's that says why."""
    from tvm import error

    # TVM's C++ side raises Python's own kinds by name (tvm_ffi.error), beside its own
    kinds = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, IndexError, error.OpError)
    try:
        yield
    except (BackendFailed, ModelError):
        raise
    except kinds as exc:
        raise BackendFailed(f"{what}: {why(exc)}", "use --backend onnxruntime for this model") from exc


def why(exc: BaseException) -> str:
    """TVM's reason on one line, without the stack of C++ calls in front of it."""
    text = re.sub(r"Check failed: \(.*?\)\s*(is|:)\s*", "", str(exc))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not re.match(r"^(File |Traceback|\d+: |Stack trace|\[bt\])", line)]
    return opened.first_line(RuntimeError(" ".join(said[-3:]) if said else type(exc).__name__))


def same_cpu(built_for: Mapping[str, Any]) -> Missing | None:
    """Why code of that machine cannot run on this CPU (another generation's instructions); None when it can."""
    cpu = here().cpu
    if built_for.get("cpu") in ("", None, cpu):
        return None
    return Missing(
        f"it was compiled for the CPU '{built_for['cpu']}', and this one is '{cpu}'", "build the engine again on this machine"
    )


def link_version(command: str) -> str:
    """The linker's own first line of --version, for the manifest."""
    try:
        said = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return command
    return said.splitlines()[0] if said else command
