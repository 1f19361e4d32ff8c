"""mypy over our TensorRT code with NVIDIA's types of 10.x in place of Any: every call's arguments, not only that it exists.

The product's own code takes the module as a value (`trt: Any`), since three generations are served; here a copy is read with
the module and its objects typed, from the stubs `tensorrt-stubs` of PyPI. They are never installed beside the product: a
folder `tensorrt` without code would pass for TensorRT.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_trt_contract import GUARDED, HOLDERS

import deploykit
from deploykit.trt import builder, implicit, loaded, log

STUBS = "tensorrt-stubs==10.13.0.35.1"
MODULES = {"builder": builder, "implicit": implicit, "log": log, "loaded": loaded}
# Where the stubs are no Python (a parameter called `in`), or say less than NVIDIA's own documentation in them: Dims is a
# sequence and taken from tuples, a calibrator without data answers None.
REPAIRS = {
    "(self, in: ": "(self, in_: ",
    "IPluginV3, in: ": "IPluginV3, in_: ",
    "channel_axis: int) ->": "channel_axis: int = 0) ->",
    "    MAX_DIMS: typing.ClassVar[int] = 8\n": "    MAX_DIMS: typing.ClassVar[int] = 8\n    def __iter__(self) -> typing.Iterator[int]: ...\n",
    "min: Dims, opt: Dims, max: Dims": "min: Dims | tuple, opt: Dims | tuple, max: Dims | tuple",
    "def get_batch(self, names: list[str]) -> list[int]:": "def get_batch(self, names: list[str]) -> list[int] | None:",
}
pytestmark = pytest.mark.slow


def typed(source: str) -> str:
    """A module's source with NVIDIA's types where it says Any: parameters and attributes by the names in HOLDERS."""
    text = re.sub(r"\btrt: Any\b", "_module: Any", source)
    text = re.sub(
        r"self\._context = self\._cache = None|self\._(engine|runtime) = None", "pass", text
    )  # given back, never used again
    for name, cls in HOLDERS.items():
        if cls == "IRuntimeCache":  # TensorRT-RTX's own
            continue
        text = re.sub(rf"\b(?<!self\.){name}: Any\b(?! =)", f"{name}: trt.{cls}", text)
        text = re.sub(rf"self\.{name}: Any = None", f"self.{name}: trt.{cls} = cast(Any, None)", text)
    text = text.replace("trt, engine = self._trt, self._engine", "engine = self._engine").replace("trt = self._trt", "pass")
    text = text.replace("self._trt.", "trt.")
    text = text.replace("def _config(_module: Any, builder: trt.Builder, network: trt.INetworkDefinition, spec: PlanSpec) -> Any:",
                        "def _config(_module: Any, builder: trt.Builder, network: trt.INetworkDefinition, spec: PlanSpec) -> trt.IBuilderConfig:")  # fmt: skip
    text = text.replace("def _create_context(self) -> Any:", "def _create_context(self) -> trt.IExecutionContext:")
    return text.replace("from typing import ", "import tensorrt as trt\nfrom typing import cast, ", 1)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("stubs")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder), STUBS]
    try:
        subprocess.run(pip, check=True, capture_output=True, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        pytest.skip(f"PyPI has no {STUBS}: {exc}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    typed_module = folder / "tensorrt_bindings" / "tensorrt.pyi"
    text = typed_module.read_text()
    for wrong, right in REPAIRS.items():
        assert wrong in text
        text = text.replace(wrong, right)
    typed_module.write_text(text)
    return folder


def _findings(stubs: Path, folder: Path, sources: dict[str, str]) -> list[str]:
    """mypy's errors on these modules, without those about what this generation lacks and the code asks for with hasattr."""
    for name, source in sources.items():
        (folder / f"typed_{name}.py").write_text(source)
    (folder / "mypy.ini").write_text("[mypy]\npython_version = 3.11\nfollow_imports = silent\nignore_missing_imports = True\n")
    environment = {**os.environ, "MYPYPATH": os.pathsep.join([str(stubs), str(Path(deploykit.__file__).parent.parent)])}
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "mypy.ini",
        "--cache-dir",
        str(folder / "cache"),
        "--no-error-summary",
    ]
    done = subprocess.run(
        [*command, *(f"typed_{name}.py" for name in sources)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    lacking = {member for (_, member), generations in GUARDED.items() if "10" in generations}
    lines = [line for line in done.stdout.splitlines() if line.startswith("typed_") and ": error: " in line]
    return [line for line in lines if not any(f'has no attribute "{member}"' in line for member in lacking)]


def test_our_calls_fit_nvidias_types(stubs: Path, tmp_path: Path) -> None:
    sources = {name: typed(inspect.getsource(module)) for name, module in MODULES.items()}
    assert sources["builder"].count("trt.INetworkDefinition") == 3
    assert "self._engine: trt.ICudaEngine" in sources["loaded"]
    found = _findings(stubs, tmp_path, sources)
    assert not found, "\n".join(found)


def test_a_wrong_argument_is_found(stubs: Path, tmp_path: Path) -> None:
    source = typed(inspect.getsource(builder)).replace(
        "config.set_timing_cache(cache, False)", 'config.set_timing_cache("no", 3)'
    )
    found = _findings(stubs, tmp_path, {"builder": source})
    assert any("set_timing_cache" in line for line in found), found
