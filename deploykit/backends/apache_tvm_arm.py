"""The proof of a library for 64-bit ARM: run under qemu-user on inputs whose outputs are known, by a small C++ program.

The program is what a board without Python would run as well: it needs TVM's runtime, the library, and nothing else. TVM's
runtime for ARM comes from PyPI's own wheels, read from a folder in the user's cache (see `runtime_wheels`); nothing is
downloaded here. Times under emulation mean nothing, so none is taken.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deploykit import cache_folder
from deploykit.backends import installed
from deploykit.errors import BackendFailed
from deploykit.session import Missing
from deploykit.signature import Feeds, Outputs, Signature

_COMPILER = "aarch64-linux-gnu-g++"
_EMULATOR = "qemu-aarch64-static"
_LIBRARIES = ("tvm/lib/libtvm_runtime.so", "tvm_ffi/lib/libtvm_ffi.so")
_DEBIAN_ROOT = "/usr/aarch64-linux-gnu"  # where Debian's cross packages put ARM's C and C++ libraries
_TIMEOUT_S = 600.0
_CODES = {
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "int32": (0, 32),
    "int64": (0, 64),
    "int8": (0, 8),
    "int16": (0, 16),
    "uint8": (1, 8),
    "uint16": (1, 16),
    "uint32": (1, 32),
    "uint64": (1, 64),
    "bool": (6, 8),
}

# usage: run LIBRARY OUTPUTS (FILE CODE BITS NDIM DIM...)...; writes OUTPUTS.0, OUTPUTS.1, ... as raw bytes
PROGRAM = r"""
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

namespace ffi = tvm::ffi;

struct HostMemory {
  void AllocData(DLTensor* tensor) {
    if (posix_memalign(&tensor->data, 64, ffi::GetDataSize(*tensor) + 64)) abort();
  }
  void FreeData(DLTensor* tensor) { free(tensor->data); }
};

int main(int argc, char** argv) try {
  const DLDevice cpu{kDLCPU, 0};
  std::vector<ffi::Any> inputs;
  for (int at = 3; at < argc;) {
    std::ifstream file(argv[at], std::ios::binary);
    DLDataType type{uint8_t(atoi(argv[at + 1])), uint8_t(atoi(argv[at + 2])), 1};
    std::vector<int64_t> dims(atoi(argv[at + 3]));
    at += 4;
    for (auto& dim : dims) dim = atoll(argv[at++]);
    ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(HostMemory(), ffi::Shape(dims.begin(), dims.end()), type, cpu);
    file.read(static_cast<char*>(tensor.data_ptr()), ffi::GetDataSize(tensor.numel(), type));
    if (!file) throw std::runtime_error("an input file is too short");
    inputs.push_back(tensor);
  }
  ffi::Module library = ffi::Module::LoadFromFile(argv[1]);
  ffi::Module machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  const int pooled = 2;
  machine->GetFunction("vm_initialization").value()(int(kDLCPU), 0, pooled);
  std::vector<ffi::AnyView> views(inputs.begin(), inputs.end());
  ffi::Any result;
  machine->GetFunction("main").value().CallPacked(views.data(), int(views.size()), &result);
  std::vector<ffi::Tensor> outputs;
  if (auto one = result.as<ffi::Tensor>()) {
    outputs.push_back(*one);
  } else {
    for (const auto& each : result.cast<ffi::Array<ffi::Tensor>>()) outputs.push_back(each);
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::ofstream file(std::string(argv[2]) + "." + std::to_string(i), std::ios::binary);
    const size_t bytes = ffi::GetDataSize(outputs[i].numel(), outputs[i].dtype());
    file.write(static_cast<const char*>(outputs[i].data_ptr()), bytes);
  }
  return 0;
} catch (const std::exception& error) {
  fprintf(stderr, "%s\n", error.what());
  return 1;
}
"""


def wheels_folder() -> Path | None:
    """Where TVM's wheels for ARM are looked for; None where there is no cache folder."""
    version = installed.version("apache-tvm") or "none"
    return cache_folder.made(f"tvm-{version}-aarch64")


def missing() -> Missing | None:
    """What a run under qemu lacks here, with the command that adds it; None when nothing is."""
    if shutil.which(_COMPILER) is None:
        return Missing(f"{_COMPILER} is not installed", "apt-get install g++-aarch64-linux-gnu")
    if shutil.which(_EMULATOR) is None:
        return Missing(f"{_EMULATOR} is not installed", "apt-get install qemu-user-static")
    folder = wheels_folder()
    if folder is None:
        return Missing("there is no cache folder to read TVM's wheels for ARM from", "set XDG_CACHE_HOME to a folder")
    if len(runtime_wheels(folder)) < len(_LIBRARIES):
        versions = installed.versions("apache-tvm", "apache-tvm-ffi")
        wanted = " ".join(f"{name}=={version}" for name, version in versions.items())
        platforms = " ".join(f"--platform manylinux_2_{minor}_aarch64" for minor in (28, 27, 24))
        return Missing(
            "TVM's runtime for ARM is not here",
            f"pip download --no-deps --only-binary=:all: {platforms} --python-version 3.11 -d {folder} {wanted}",
        )
    return None


def runtime_wheels(folder: Path) -> dict[str, Path]:
    """The wheel in `folder` that holds each library of TVM's ARM runtime, of the versions installed here."""
    names = {
        f"{name.replace('-', '_')}-{version}-" for name, version in installed.versions("apache-tvm", "apache-tvm-ffi").items()
    }
    found: dict[str, Path] = {}
    for wheel in sorted(folder.glob("*aarch64.whl")):
        if not any(wheel.name.startswith(name) for name in names):
            continue
        try:
            inside = set(zipfile.ZipFile(wheel).namelist())
        except (OSError, zipfile.BadZipFile):  # a download that was cut short
            continue
        found |= {library: wheel for library in _LIBRARIES if library in inside}
    return found


def outputs(library: Path, signature: Signature, feeds: Feeds, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> Outputs:
    """What the ARM library answers to `feeds`, run in `folder` under qemu; `shapes` are those of the outputs, by name.

    Raises BackendFailed with what the compiler, the emulator or TVM said.
    """
    program = _program(folder)
    arguments: list[str] = []
    for spec in signature.inputs:
        array = np.asarray(feeds[spec.name], order="C")
        file = folder / f"in-{len(arguments)}"
        file.write_bytes(array.tobytes())
        code, bits = _CODES[spec.dtype]
        arguments += [str(file), str(code), str(bits), str(array.ndim), *map(str, array.shape)]
    out = folder / "out"
    _run([_EMULATOR, "-L", _DEBIAN_ROOT, "-E", f"LD_LIBRARY_PATH={folder}", str(program), str(library), str(out), *arguments])
    found: Outputs = {}
    for at, spec in enumerate(signature.outputs):
        data = (folder / f"out.{at}").read_bytes()
        found[spec.name] = np.frombuffer(data, dtype=spec.dtype).reshape(shapes[spec.name])
    return found


def _program(folder: Path) -> Path:
    """The C++ program, compiled for ARM into `folder`, beside TVM's runtime."""
    wheels = wheels_folder()
    assert wheels is not None
    for library, wheel in runtime_wheels(wheels).items():
        (folder / Path(library).name).write_bytes(zipfile.ZipFile(wheel).read(library))
    source = folder / "run.cc"
    source.write_text(PROGRAM)
    headers = [f"-I{_headers()}"]
    _run(
        [
            _COMPILER,
            "-std=c++17",
            "-O1",
            *headers,
            str(source),
            "-o",
            str(folder / "run"),
            f"-L{folder}",
            "-ltvm_runtime",
            "-ltvm_ffi",
        ]
    )
    return folder / "run"


@functools.cache
def _headers() -> str:
    import tvm_ffi.libinfo

    return str(tvm_ffi.libinfo.find_include_path())


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as exc:
        lines = [line for line in (exc.stderr or "").splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else f"exit code {exc.returncode}")
        raise BackendFailed(f"{Path(command[0]).name} failed: {said[:300]}") from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise BackendFailed(f"{Path(command[0]).name} failed: {exc}") from exc
