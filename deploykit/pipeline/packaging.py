"""A folder to take to a device: the engine, what goes in and comes out, an example that runs it, and a check of its outputs."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import children, data, preprocess
from deploykit.artifact import Artifact, manifest_path
from deploykit.data.image_input import ImageInput, image_input
from deploykit.errors import BackendFailed, DataError, InputError, MissingBackend
from deploykit.pipeline import package_text, platforms
from deploykit.pipeline.delivered import put_in_place, scratch_beside
from deploykit.pipeline.predicting import Runner, opened_as
from deploykit.pipeline.request import Narrator
from deploykit.pipeline.shares import class_names
from deploykit.preprocess import Preprocess
from deploykit.samples import Samples

CASES = 3
CHECK_TIMEOUT_S = 600.0
_PHONES = {"android": ("kt", "OnDevice.kt", "Engine.kt"), "ios": ("swift", "OnDevice.swift", "Engine.swift")}
# Largest difference on the device, of the largest output: another CPU sums in another order; of an INT8 graph single values
# on a rounding edge may fall to the other side, and go on from there.
_TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2}
_INT8_TOLERANCE = 5e-2


@dataclass(frozen=True)
class PackageRequest:
    """What goes into a package. data: inputs of the check (None: seeded random ones); reference: an engine or .onnx that runs
    here and says what to expect, for an engine that cannot; preprocess, classes: where the manifest has none."""

    platform: str
    batch: int = 1
    cases: int = CASES
    data: str | None = None
    preprocess: str | None = None
    classes: Path | None = None
    reference: Path | None = None


@dataclass(frozen=True)
class Packaged:
    """A finished package: its folder, the files in it, and what is to be known about it."""

    folder: Path
    files: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def package(path: Path, request: PackageRequest, out: Path, narrator: Narrator) -> Packaged:
    """The package of the engine at `path` in the folder `out`, whole or not at all.

    Raises InputError for a combination that makes no sense, with the closest that does; what the engine raises where it
    is run for the expected outputs; BackendFailed when the example does not give these outputs back here.
    """
    backend, engine, facts = opened_as(path)
    runtime = platforms.require(engine, backend, request.platform)
    _require_replaceable(out)
    batch = engine.signature.fixed_batch or request.batch
    if request.platform in _PHONES:
        _require_floats(engine)
    if backend == "litert" and request.platform == "android":
        _require_kotlin(engine, batch)
    own = preprocess.chosen(request.preprocess, facts.get("preprocess"))
    names = list(class_names(request.classes) or facts.get("classes") or ())
    narrator.step(f"expected outputs of {path.name}")
    samples = _samples(engine, request, own, batch)
    inputs, outputs = _cases(path, engine, request, samples, batch)
    if backend == "litert" and request.platform in _PHONES:
        inputs, outputs = _in_file_order(engine, "inputs", inputs), _in_file_order(engine, "outputs", outputs)
    notes = [*samples.notes] if not samples.random else ["the check's inputs are random: --data takes real ones"]
    with scratch_beside(out) as scratch:
        folder = scratch / "package"
        model = folder / "model"
        model.mkdir(parents=True)
        _copy_engine(engine, model)
        _write_json(model / "model.json", _facts(engine, backend, request, batch, inputs, outputs))
        notes += _write_preprocess(engine, own, model)
        if names:
            (model / "classes.txt").write_text("\n".join(names) + "\n")
        arrays = {f"in/{n}": a for n, a in inputs.items()} | {f"out/{n}": a for n, a in outputs.items()}
        with (model / "expected.npz").open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        _write_example(backend, request.platform, folder, inputs, outputs)
        images = (model / "preprocess.json").is_file()
        classes = next(iter(outputs.values())).ndim == 3  # cases, batch, classes
        text = package_text.readme(engine, backend, runtime, request.platform, images=images, classes=classes)
        (folder / "README.md").write_text(text)
        if request.platform not in _PHONES:
            (folder / "requirements.txt").write_text(package_text.requirements(engine, runtime, images=images))
            notes += _checked_here(engine, folder, narrator)
        else:
            notes.append("the Kotlin and Swift files are not compiled here; check() tests them on a device")
        files = tuple(sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()))
        _deliver(folder, out)
    return Packaged(out, files, tuple(notes))


def _require_replaceable(out: Path) -> None:
    if out.is_file():
        raise InputError(f"{out} is a file", "choose a folder with -o")
    if out.is_dir() and any(out.iterdir()) and not (out / "model" / "model.json").is_file():
        raise InputError(f"{out} is there already and is no package of deploykit's", "choose another -o")


def _require_floats(engine: Artifact) -> None:
    """Raises InputError for what the Kotlin and Swift examples don't feed: inputs or outputs other than float32."""
    others = [str(s) for s in (*engine.signature.inputs, *engine.signature.outputs) if s.dtype != "float32"]
    integer = engine.options.get("io") == "int8"
    if others or integer:
        what = ", ".join(others) or "int8 inputs and outputs"
        raise InputError(
            f"the examples for phones feed float32 only, and this engine has {what}",
            "package it for linux-arm, or build it with float inputs and outputs",
        )


def _require_kotlin(engine: Artifact, batch: int) -> None:
    """Raises InputError for what LiteRT's Kotlin API cannot do: give a file another batch than it was traced at, which is 1
    for a file of any batch; take several inputs or outputs safely, since it numbers them in an order of its own."""
    files = engine.facts.get("files") or {"0": engine.path.name}
    if batch != 1 and engine.signature.fixed_batch is None and "0" in files:
        raise InputError(
            f"{engine.path.name} is resized to batch {batch} where it runs, and LiteRT's Kotlin API cannot resize",
            "use --batch 1, or package it for ios, linux-arm or linux-x86",
        )
    several = [kind for kind in ("inputs", "outputs") if len(getattr(engine.signature, kind)) > 1]
    if several:
        raise InputError(
            f"{engine.path.name} has several {' and '.join(several)}, and which is which LiteRT's Kotlin API does not say by position",
            "package it for ios, linux-arm or linux-x86, or build it for --backend executorch or onnxruntime",
        )


def _in_file_order(engine: Artifact, kind: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays as the .tflite itself numbers them: the Swift example knows inputs and outputs by position only."""
    names = [str(row["name"]) for row in engine.facts.get(kind) or ()]
    if len(arrays) > 1 and sorted(names) != sorted(arrays):
        raise InputError(
            f"the manifest of {engine.path.name} does not say in which order the file has its {kind}", "build it again"
        )
    return {name: arrays[name] for name in names} if len(arrays) > 1 else dict(arrays)


def _samples(engine: Artifact, request: PackageRequest, own: Preprocess | None, batch: int) -> Samples:
    free = [str(s) for s in engine.signature.inputs if engine.signature.free_axes(s)]
    if free:
        raise InputError(
            f"input {', '.join(free)} has dynamic axes beside the batch, and a package is for one shape",
            "export the model with fixed sizes: --input NAME:DTYPE:SHAPE",
        )
    spec = request.data if request.data is not None else f"random:{request.cases * batch}"
    return data.open(spec, engine.signature, preprocess=own, limit=None if request.data is None else request.cases * batch)


def _cases(
    path: Path, engine: Artifact, request: PackageRequest, samples: Samples, batch: int
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Inputs and outputs by name, one case along axis 0. Raises MissingBackend where nothing here can run the engine."""
    source = request.reference or path
    try:
        runner = Runner(source, batch)
    except MissingBackend as exc:
        if request.reference is not None:
            raise
        raise MissingBackend(
            exc.message, f"{exc.remedy}; or name an engine or .onnx that runs here and says what to expect: --reference m.onnx"
        ) from exc
    found_in: dict[str, list[NDArray[Any]]] = {s.name: [] for s in engine.signature.inputs}
    found_out: dict[str, list[NDArray[Any]]] = {s.name: [] for s in engine.signature.outputs}
    with runner:
        theirs = ({s.name for s in runner.signature.inputs}, {s.name for s in runner.signature.outputs})
        if theirs != (set(found_in), set(found_out)):
            raise InputError(
                f"{source.name} has other inputs or outputs than {path.name}", "name the model that it was made from"
            )
        for feeds, _ in samples.batches(batch, pad=True):
            outputs = runner.infer(feeds)
            for name, arrays in found_in.items():
                arrays.append(np.array(feeds[name]))
            for name, arrays in found_out.items():
                arrays.append(np.array(outputs[name]))
    return {n: np.stack(a) for n, a in found_in.items()}, {n: np.stack(a) for n, a in found_out.items()}


def _facts(
    engine: Artifact,
    backend: str,
    request: PackageRequest,
    batch: int,
    inputs: Mapping[str, NDArray[Any]],
    outputs: Mapping[str, NDArray[Any]],
) -> dict[str, Any]:
    def ports(arrays: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
        return [{"name": n, "dtype": a.dtype.name, "shape": list(a.shape[1:])} for n, a in arrays.items()]

    integer = engine.precision.startswith("int8") or engine.precision == "mixed"
    file = _file_for(engine, backend, batch)
    return {
        "backend": backend,
        "precision": engine.precision,
        "platform": request.platform,
        "file": file,
        "sha256": engine.companions.get(file) or engine.sha256,
        "batch": batch,
        "inputs": ports(inputs),
        "outputs": ports(outputs),
        "cases": len(next(iter(inputs.values()))),
        "tolerance": _INT8_TOLERANCE if integer or request.reference else _TOLERANCES.get(engine.precision, _INT8_TOLERANCE),
        "versions": dict(engine.versions),
    }


def _file_for(engine: Artifact, backend: str, batch: int) -> str:
    """The file that runs this batch: backends that cannot keep the batch free write one for each."""
    files: Mapping[str, str] = engine.facts.get("files") or {}
    if backend == "litert" and files:
        chosen = files.get("0") or files.get(str(batch))
        if chosen is None:
            raise InputError(f"{engine.path.name} was not made for batch {batch}", f"use --batch {next(iter(files))}")
        return chosen
    exact = f"model-b{batch}.so"
    return exact if backend == "tvm" and exact in engine.companions else engine.path.name


def _copy_engine(engine: Artifact, model: Path) -> None:
    for file in (engine.path, manifest_path(engine.path), *(engine.path.parent / name for name in engine.companions)):
        if file.is_file():
            shutil.copyfile(file, model / file.name)


def _write_json(path: Path, doc: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(doc, indent=1) + "\n")


def _write_preprocess(engine: Artifact, own: Preprocess | None, model: Path) -> list[str]:
    """Writes preprocess.json where the model takes pictures and how is known; returns what to note."""
    if own is None:
        return ["no preprocessing is known for this engine: --preprocess puts it into the package"]
    try:
        target: ImageInput = image_input(engine.signature, own)
    except DataError as exc:
        return [f"no preprocess.json: {exc.message}"]
    if target.layout not in ("nchw", "nhwc"):
        spec = engine.signature.inputs[0]
        return [f"no preprocess.json: input {spec} has no axis of channels, and the examples write pictures with one"]
    size = {"layout": target.layout, "channels": target.channels, "height": target.height, "width": target.width}
    _write_json(model / "preprocess.json", {"input": target.name, "dtype": target.dtype, **own.to_json(), **size})
    return []


def _write_example(
    backend: str, platform: str, folder: Path, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
) -> None:
    """The example's files, word for word from deploykit/on_device; for phones the cases as raw little-endian floats too."""
    place = importlib.resources.files("deploykit.on_device")
    if platform not in _PHONES:
        for source, name in ((f"engine_{backend}.py", "engine.py"), ("run.py", "run.py"), ("check.py", "check.py")):
            (folder / name).write_text(place.joinpath(source).read_text())
        return
    suffix, shared, own = _PHONES[platform]
    (folder / shared).write_text(place.joinpath(shared).read_text())
    (folder / own).write_text(place.joinpath(f"{backend}.{suffix}").read_text())
    cases = folder / "model" / "cases"
    cases.mkdir()
    for kind, arrays in (("in", inputs), ("out", outputs)):
        for position, array in enumerate(arrays.values()):
            for case, values in enumerate(array):
                (cases / f"{case}.{kind}.{position}.bin").write_bytes(values.astype("<f4").tobytes())


def _checked_here(engine: Artifact, folder: Path, narrator: Narrator) -> list[str]:
    """Runs the package's own check in a child process, where the engine runs here; returns what it found."""
    if engine.device not in ("", "cpu"):
        return [f"compiled for {engine.device}: check.py was not run here"]
    narrator.step("check the package")
    code, said = children.run("check.py", run_check, folder, timeout_s=CHECK_TIMEOUT_S)
    last = said.strip().splitlines()[-1] if said.strip() else ""
    if code != 0:
        raise BackendFailed(
            f"the packaged example does not give the engine's outputs back: {last}", "this is a fault of deploykit's"
        )
    return [f"check.py here: {last}"]


def run_check(folder: Path) -> tuple[int, str]:
    """(exit code, output) of the package's check.py; runs in a child process."""
    import contextlib
    import io
    import runpy
    import sys

    sys.path.insert(0, str(folder))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(folder / "check.py"), run_name="__main__")
    except SystemExit as exc:
        return int(exc.code or 0), said.getvalue()
    except Exception as exc:  # the example's own failure, whatever it is, is what is asked for here
        return 1, f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
    finally:
        sys.path.remove(str(folder))
    return 0, said.getvalue()


def _deliver(folder: Path, out: Path) -> None:
    """Puts the finished folder in place of an older package, in one step."""
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    put_in_place(folder, out)
