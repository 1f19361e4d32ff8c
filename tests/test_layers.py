"""The layers hold: nothing heavy at import, arrows point down only, every --help works without any engine installed."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import deploykit

HEAVY = [
    "torch",
    "torchvision",
    "torchao",
    "timm",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "pycuda",
    "tvm",
    "executorch",
    "litert_torch",
    "ai_edge_litert",
    "ai_edge_quantizer",
    "keras",
    "sklearn",
    "scipy",
    "PIL",
    "safetensors",
    "nncf",
]
ROOT = Path(deploykit.__file__).parent
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY!r}:
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Blocker())
"""


def _modules() -> list[str]:
    found = [m.name for m in pkgutil.walk_packages([str(ROOT)], "deploykit.")]
    return [name for name in found if not name.endswith("__main__")]


def test_every_module_imports_with_the_heavy_packages_blocked() -> None:
    code = BLOCKER + "import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in _modules())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_blocker_does_block() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKER + "import onnx"], capture_output=True, text=True, check=False)
    assert "blocked: onnx" in done.stderr


def test_every_help_works_with_the_heavy_packages_blocked() -> None:
    commands = [
        "run",
        "bench",
        "export",
        "check",
        "calibrate",
        "quantize",
        "build-trt",
        "build",
        "finetune",
        "doctor",
        "compare",
        "explain",
        "gate",
        "report",
        "predict",
        "package",
    ]
    code = (
        BLOCKER
        + f"""
from deploykit.cli.main import run
for command in {commands!r}:
    assert run([command, '--help']) == 0, command
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Example:") >= len(commands)


def _imports(path: Path) -> set[str]:
    """Modules of deploykit that a file imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("deploykit"):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("deploykit"))
    return found


def _layer(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / parts[1]).is_dir() else "nouns"


ALLOWED = {
    "nouns": {"nouns", "backends"},  # hosted.py, the measuring child's side, opens backends by name
    "trt": {"nouns", "trt"},
    "data": {"nouns", "data"},
    "backends": {"nouns", "backends", "trt"},
    "stages": {"nouns", "stages", "data", "backends"},
    "pipeline": {"nouns", "stages", "backends", "data", "trt", "pipeline"},
    "cli": {"nouns", "stages", "backends", "data", "pipeline", "cli"},
}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_only(path: Path) -> None:
    name = ".".join(["deploykit", *path.relative_to(ROOT).with_suffix("").parts])
    if path.parent == ROOT and path.stem.startswith("__"):
        return  # the package's front doors: deploykit.open and python -m deploykit
    layer = _layer(name)
    for imported in _imports(path):
        assert _layer(imported) in ALLOWED[layer], f"{name} imports {imported}"


def test_stages_never_import_each_other() -> None:
    for path in (ROOT / "stages").rglob("*.py"):
        own = path.relative_to(ROOT / "stages").parts[0].removesuffix(".py").split("_")[0]
        for imported in _imports(path):
            parts = imported.split(".")
            if parts[:2] == ["deploykit", "stages"] and len(parts) > 2:
                other = parts[2].split("_")[0]
                assert {own, other} in ({own}, {"export", "source"}, {"finetune", "source"}), f"{path.name} imports {imported}"


def test_only_the_command_line_prints() -> None:
    for path in ROOT.rglob("*.py"):
        if "cli" in path.parts:
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert not [c for c in calls if c.func.id == "print"], f"{path} prints"  # type: ignore[attr-defined]


def test_typed_marker_is_there() -> None:
    assert (ROOT / "py.typed").is_file()
    assert importlib.import_module("deploykit").__version__
