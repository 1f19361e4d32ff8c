"""NVIDIA's real Python bindings of three generations, importable without a GPU: the wheels from PyPI, and stub libraries.

The bindings link libnvinfer and friends, which no package index serves for a CPU machine. A stub that defines the dozen
entry points they import, each returning null, is enough to import them: the classes, enums and signatures are then real.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

WHEELS = {
    "8.6": "tensorrt-bindings==8.6.1",
    "10": "tensorrt-cu12-bindings==10.16.1.11",
    "11": "tensorrt-cu13-bindings==11.4.0.106",
}
_ENTRY = re.compile(r"INTERNAL|Plugin|[Pp]arser|nvuff|nvcaffe")


def install(generation: str, folder: Path) -> Path:
    """The folder that holds `tensorrt_bindings` and, in `stubs`, its libraries. Raises CalledProcessError without PyPI."""
    wheels = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(wheels)]
    subprocess.run([*pip, WHEELS[generation]], check=True, capture_output=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    library = folder / "tensorrt_bindings" / "tensorrt.so"
    needed = re.findall(r"\[(libnv\w+\.so\.\d+)\]", _said(["readelf", "-d", str(library)]))
    missing = [line.split()[-1] for line in _said(["nm", "-D", "--undefined-only", str(library)]).splitlines()]
    entries = [name for name in missing if _ENTRY.search(name) and "@" not in name]
    stubs = folder / "stubs"
    stubs.mkdir()
    (stubs / "stub.c").write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in entries))
    for name in needed:
        compile_it = ["gcc", "-shared", "-fPIC", str(stubs / "stub.c"), "-o", str(stubs / name), f"-Wl,-soname,{name}"]
        subprocess.run(compile_it, check=True, capture_output=True)
    return folder


def run(folder: Path, code: str) -> Any:
    """What `code` prints as JSON, run with `trt` being those bindings and deploykit importable."""
    script = f"import json, sys; sys.path.insert(0, {str(folder)!r}); import tensorrt_bindings as trt\n{code}"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder / "stubs"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


MEMBERS = """
import enum
found = {}
for name in dir(trt):
    thing = getattr(trt, name)
    if isinstance(thing, type):
        found[name] = [a for a in dir(thing) if not a.startswith("__")]
print(json.dumps({"version": trt.__version__, "module": dir(trt), "classes": found}))
"""


def _said(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
