"""The workshop: one model on its way through the stages, what is made kept in the store under a key of all that went in."""

from __future__ import annotations

import ast
import functools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from deploykit import backends, children
from deploykit.artifact import Artifact
from deploykit.observation import INTEGER
from deploykit.pipeline.request import Narrator
from deploykit.signature import Signature
from deploykit.source_spec import SourceSpec
from deploykit.store import Key, Store, source_hash
from deploykit.verdict import Finding

STAGE_TIMEOUT_S = 1800.0
PACKAGE = Path(__file__).parent.parent

# What each stage is made of: its version is a hash of these files.
_CODE: Mapping[str, tuple[str, ...]] = {
    "export": ("stages/export*.py", "stages/source*.py", "source_spec.py", "graph.py", "signature.py", "traced.py"),
    "source": ("stages/export*.py", "stages/source*.py", "source_spec.py"),
    "check": ("stages/checks/*.py", "graph.py", "signature.py"),
    "calibrate": (
        *("stages/calibration.py", "activations.py", "observation.py", "histogram.py", "clipping.py", "calibration_table.py"),
        *("foreign_cache.py", "trt_cache.py", "pipeline/given.py"),
        *("graph.py", "nonfinite.py", "signature.py", "data/*.py", "preprocess.py", "pipeline/ranges.py"),
    ),
    # `best` is chosen by the noise of INT8 graphs
    "calibrate-best": ("stages/precision/*.py", "quantized_layers.py"),
    "precision": ("stages/precision/*.py", "graph.py", "pipeline/int8.py", "pipeline/mixed.py", "stages/mixed*.py"),
    "layers": ("stages/layers/*.py", "activations.py", "quantized_layers.py", "data/*.py", "preprocess.py"),
    "engine": ("session.py", "pipeline/prepare.py", "backends/opened.py", "backends/torch_source.py", "traced.py"),
    "measure": (
        "hosted.py",
        "children.py",
        "pipeline/measuring.py",
        "backends/opened.py",
        "backends/torch_source.py",
        "stages/bench.py",
        "stages/accuracy.py",
        "measurement.py",
        "drift*.py",
        "paired.py",
        "data/*.py",
        "preprocess.py",
    ),
}
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "export": ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime"),
    "source": ("torch", "torchvision", "timm"),
    "check": ("onnx", "onnxruntime"),
    "calibrate": ("onnxruntime", "numpy", "pillow"),
    "precision": ("onnx", "onnxruntime", "numpy"),
    "layers": ("onnx", "onnxruntime", "numpy"),
}


def stage_version(stage: str, *more: Path) -> str:
    """A hash of the source code that the stage is made of."""
    return source_hash(*stage_files(stage), *more)


def stage_files(stage: str) -> tuple[Path, ...]:
    """The source files that a stage is made of."""
    return tuple(f for pattern in _CODE[stage] for f in sorted(PACKAGE.glob(pattern)))


@functools.cache
def backend_code(name: str) -> tuple[Path, ...]:
    """The files that a backend is made of: its module, the `<module>_*.py` beside it, and what these import of backends/;
    where one imports anything of trt/, all of trt/."""
    folder = PACKAGE / "backends"
    stem = backends.MODULES[name]
    found: set[Path] = set()
    left = {folder / f"{stem}.py", *folder.glob(f"{stem}_*.py")}
    while left:
        path = left.pop()
        found.add(path)
        wanted = _imports(path)
        own = {folder / f"{module.split('.')[2]}.py" for module in wanted if module.startswith("deploykit.backends.")}
        if any(module.startswith("deploykit.trt") for module in wanted):
            own.update((PACKAGE / "trt").glob("*.py"))
        left |= {file for file in own if file.is_file()} - found
    return tuple(sorted(found))


def _imports(path: Path) -> set[str]:
    """The dotted names that a file's `from X import Y` may mean: X and X.Y."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
    return {str(n.module) for n in nodes} | {f"{n.module}.{alias.name}" for n in nodes for alias in n.names}


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of the installed ones of these packages, without importing them."""
    found: dict[str, str] = {}
    for name in names:
        for wheel in (name, f"{name}-gpu") if name == "onnxruntime" else (name,):
            try:
                found[wheel] = metadata.version(wheel)
            except metadata.PackageNotFoundError:
                continue
    return found


@dataclass
class Workshop:
    """One model on its way through the stages: what is made is kept here and in the store."""

    store: Store
    narrator: Narrator
    spec: SourceSpec
    model: Artifact
    source: Artifact | None
    findings: tuple[Finding, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    graphs: dict[str, Artifact] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    tables: dict[str, Artifact] = field(default_factory=dict)
    _making: dict[str, threading.Lock] = field(default_factory=dict, repr=False)  # two threads that need the same make it once

    @property
    def name(self) -> str:
        """The model's name: the table's first column and the store's folder."""
        return self.spec.name

    @property
    def signature(self) -> Signature:
        """The exported graph's signature."""
        return self.model.signature

    @property
    def base_precision(self) -> str:
        """The precision the given graph already has: int8 when it holds quantized nodes, else fp32; CPU backends compute
        a graph in FP16 in FP32 too, and a GPU's FP16 row takes it as it is."""
        return "int8" if set(self.summary.get("ops", {})) & INTEGER else "fp32"

    def keep(
        self,
        stage: str,
        what: str,
        parent: str | None,
        options: Mapping[str, Any],
        build: Callable[[Path], Artifact],
        *,
        versions: Mapping[str, str] | None = None,
        code: tuple[Path, ...] = (),
        fresh: bool = False,
    ) -> Artifact:
        """The artifact of one stage, from the store or made now. With `fresh` an old one is dropped first."""
        known = package_versions(_PACKAGES[stage]) if versions is None else dict(versions)
        key = Key(what.replace(" ", "-"), stage_version(stage, *code), parent, options, known)
        if fresh:
            self.store.drop(self.name, key)

        def fill(folder: Path) -> Artifact:
            self.narrator.step(f"{what} ({self.name})")
            start = time.perf_counter()
            made = build(folder)
            facts = {"build_s": time.perf_counter() - start, **made.facts}
            return replace(made, options={**options, **made.options}, versions={**known, **made.versions}, facts=facts)

        with self._making.setdefault(key.digest, threading.Lock()):
            found, reused = self.store.make(self.name, key, fill)
        if what not in self.made:  # an engine that another one was made of comes up twice
            (self.reused if reused else self.made).append(what)
        return found

    def child(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """What `function(*args)` returns, run in a child process; its progress is told on."""
        return children.run(what, function, *args, timeout_s=STAGE_TIMEOUT_S, progress=self.narrator.progress)
