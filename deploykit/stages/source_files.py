"""Models from the user's own files: a factory in a Python file, an ExportedProgram (.pt2)."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import pickle
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deploykit.artifact import sha256_of
from deploykit.errors import InputError, ModelError
from deploykit.preprocess import Preprocess
from deploykit.preprocess import parse as parse_preprocess
from deploykit.signature import Dim, TensorSpec
from deploykit.source_spec import BATCH, SourceSpec, parse_input
from deploykit.stages import source_keras
from deploykit.stages.source import DEFAULT_IMAGE, Parts, Tensors, require_input, where
from deploykit.stages.source_library import apply_checkpoint, parameters_of, seeded

if TYPE_CHECKING:
    import torch


def factory_model(spec: SourceSpec, *, fresh_head: bool) -> Parts:
    """The module that a factory in the user's file returns.

    On the module or in the file may stand: example_inputs (dict name -> tensor, or a tuple in the order of forward's
    parameters), INPUTS (texts as of --input), PREPROCESS (text as of --preprocess), CLASSES, OUTPUTS (names).
    Raises ModelError with the user's own exception and line, and for a factory that returns no nn.Module.
    """
    import torch

    file = spec.file
    assert file is not None
    source_keras.use_torch()
    before = set(sys.modules)
    with _importable_from(file.parent):
        holder = _execute(file)
        factory = getattr(holder, spec.reference, None)
        if not callable(factory):
            there = [n for n, v in vars(holder).items() if callable(v) and getattr(v, "__module__", None) == holder.__name__]
            raise ModelError(f"{file.name} has no function '{spec.reference}'", f"it has: {', '.join(there) or 'none'}")
        options = _factory_options(spec, factory)
        try:
            with seeded():
                module = factory(**options)
        except Exception as exc:
            raise ModelError(
                f"{file.name}:{spec.reference}() failed: {where(exc)}", "it is called without arguments here"
            ) from exc
    if source_keras.is_model(module):
        return _keras_parts(spec, module, holder, before, file, fresh_head=fresh_head)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{file.name}:{spec.reference}() returned a {type(module).__name__}", "return a torch.nn.Module or a Keras model"
        )
    notes = apply_checkpoint(spec, module, fresh_head=fresh_head)

    def said(name: str) -> Any:
        return getattr(module, name, None) if getattr(module, name, None) is not None else getattr(holder, name, None)

    names = parameters_of(module)
    inputs, example = _factory_inputs(spec, names, said("example_inputs"), said("INPUTS"), file.name)
    require_input(spec, names)
    preset: Preprocess | None = parse_preprocess(said("PREPROCESS")) if said("PREPROCESS") else None
    classes = tuple(str(c) for c in said("CLASSES")) if said("CLASSES") else None
    return Parts(
        module,
        inputs or (TensorSpec(names[0] if names else "x", "float32", DEFAULT_IMAGE.shape),),
        example=example,
        preprocess=preset,
        classes=classes,
        local_files=_local_files(holder, before, file),
        output_names=tuple(said("OUTPUTS") or ()),
        notes=notes,
        guessed_input=not inputs,
    )


def _keras_parts(spec: SourceSpec, model: Any, holder: ModuleType, before: set[str], file: Path, *, fresh_head: bool) -> Parts:
    """What a factory that returns a Keras model yields; PREPROCESS, CLASSES and OUTPUTS of its file hold as for any other."""
    parts = source_keras.of_model(spec, model, fresh_head=fresh_head)
    said = {name: getattr(holder, name, None) for name in ("PREPROCESS", "CLASSES", "OUTPUTS")}
    return replace(
        parts,
        preprocess=parse_preprocess(said["PREPROCESS"]) if said["PREPROCESS"] else None,
        classes=tuple(str(c) for c in said["CLASSES"]) if said["CLASSES"] else None,
        output_names=tuple(said["OUTPUTS"]) if said["OUTPUTS"] else parts.output_names,
        local_files=_local_files(holder, before, file),
    )


@contextlib.contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _execute(file: Path) -> ModuleType:
    loader = importlib.util.spec_from_file_location(f"deploykit_factory_{file.stem}", file)
    assert loader is not None
    assert loader.loader is not None
    holder = importlib.util.module_from_spec(loader)
    sys.modules[holder.__name__] = holder  # dataclasses and pickles in the file look themselves up there
    try:
        loader.loader.exec_module(holder)
    except Exception as exc:
        raise ModelError(f"{file.name} cannot be imported: {where(exc)}", "run it with python to see the whole error") from exc
    return holder


def _factory_options(spec: SourceSpec, factory: Any) -> dict[str, int]:
    if spec.num_classes is None:
        return {}
    accepted = inspect.signature(factory).parameters
    if "num_classes" in accepted or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return {"num_classes": spec.num_classes}
    raise InputError(f"--num-classes: the factory '{spec.reference}' takes no num_classes", "add that parameter to it")


def _factory_inputs(
    spec: SourceSpec, names: tuple[str, ...], example: Any, declared: Any, file: str
) -> tuple[tuple[TensorSpec, ...], Tensors | None]:
    """Input specs (empty: nothing says what they are) and values to feed. --input comes before INPUTS, that before
    example_inputs; values are used where their shapes agree."""
    tensors = _named_example(example, names, file) if example is not None else None
    specs = spec.inputs or tuple(parse_input(text) for text in declared or ())
    if not specs:
        return (_specs_of(tensors), tensors) if tensors else ((), None)
    if tensors is None or not all(_agrees(s, tensors.get(s.name)) for s in specs):
        return specs, None
    return specs, {s.name: tensors[s.name] for s in specs}


def _agrees(spec: TensorSpec, tensor: torch.Tensor | None) -> bool:
    if tensor is None or str(tensor.dtype).removeprefix("torch.") != spec.dtype or tensor.ndim != len(spec.shape):
        return False
    return all(isinstance(dim, str) or dim == size for dim, size in zip(spec.shape, tensor.shape, strict=True))


def _named_example(example: Any, names: tuple[str, ...], file: str) -> Tensors:
    import torch

    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        found = {str(k): v for k, v in example.items()}
    elif isinstance(example, tuple | list):
        if len(example) > len(names):
            raise ModelError(
                f"{file}: example_inputs has {len(example)} values, forward takes {list(names)}", "name them in a dict"
            )
        found = dict(zip(names, example, strict=False))
    else:
        raise ModelError(f"{file}: example_inputs is a {type(example).__name__}", "make it a dict or tuple of tensors")
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"{file}: example_inputs['{name}'] is a {type(value).__name__}", "make it a tensor")
        if names and name not in names:
            raise ModelError(f"{file}: forward has no parameter '{name}'", f"it takes: {', '.join(names)}")
    return found


def _specs_of(tensors: Tensors) -> tuple[TensorSpec, ...]:
    """Specs of example tensors: the first one's axis 0 is the batch; another input has it where its axis 0, else just one of
    its axes, has that size; without any such axis it is constant (INPUTS or --input says otherwise)."""
    batch = next((t.shape[0] for t in tensors.values() if t.ndim), 0)
    specs = []
    for name, tensor in tensors.items():
        dims: list[Dim] = list(tensor.shape)
        matching = [axis for axis, size in enumerate(dims) if size == batch]
        if 0 in matching:
            dims[0] = BATCH
        elif len(matching) == 1:
            dims[matching[0]] = BATCH
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(dims)))
    return tuple(specs)


def _local_files(holder: ModuleType, before: set[str], file: Path) -> dict[str, str]:
    """The factory's file and the modules it imported that no package installed: path relative to its folder -> sha256."""
    found = {file}
    queue = [holder, *(sys.modules[name] for name in sorted(set(sys.modules) - before))]
    seen: set[str] = set()
    while queue:
        module = queue.pop()
        path = getattr(module, "__file__", None)
        if not path or module.__name__ in seen or not _is_local(Path(path)):
            continue
        seen.add(module.__name__)
        found.add(Path(path).resolve())
        for value in list(vars(module).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name in sys.modules:
                queue.append(sys.modules[name])
    return {os.path.relpath(path, file.parent): sha256_of(path) for path in sorted(found)}


def _is_local(path: Path) -> bool:
    text = str(path.resolve())
    ours = str(Path(__file__).resolve().parents[1])
    roots = {str(Path(sysconfig.get_path(n)).resolve()) for n in ("stdlib", "platstdlib", "purelib", "platlib")}
    return path.suffix == ".py" and "site-packages" not in text and not text.startswith((*roots, ours))


def exported_program(spec: SourceSpec) -> Parts:
    """The module in a .pt2 file, with the inputs and dynamic axes it was exported with.

    Raises ModelError for a damaged file, one whose inputs aren't plain tensors, and one with pickles of other things than
    tensors: torch.export.load (2.14) would run their code.
    """
    import torch

    file = spec.file
    assert file is not None
    _refuse_code(file)
    try:
        program = torch.export.load(str(file))
    except Exception as exc:
        # torch raises AssertionError, RuntimeError, KeyError, json's and zipfile's errors here, by what is damaged.
        raise ModelError(
            f"{file.name} is no ExportedProgram of this PyTorch ({where(exc)})", "save it again with torch.export.save"
        ) from exc
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs: list[TensorSpec] = []
    batch: str | None = None
    for name in names:
        value = values.get(name) if isinstance(name, str) else None
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"{file.name}: input {name!r} is no tensor", "export it with tensors as its only inputs")
        dims: list[Dim] = []
        sizes: list[Any] = list(value.shape)  # int or SymInt
        for axis, size in enumerate(sizes):
            symbol = None if isinstance(size, int) else str(size)
            if symbol and batch is None and axis == 0:
                batch = symbol
            dims.append(int(size) if symbol is None else BATCH if symbol == batch else f"{name}_{axis}")
        specs.append(TensorSpec(str(name), str(value.dtype).removeprefix("torch."), tuple(dims)))
    note = (
        ()
        if batch
        else (
            f"{file.name} was exported with a fixed batch; export it with dynamic_shapes={{'{names[0]}': {{0: Dim('batch')}}}}",
        )
    )
    return Parts(
        _by_name(program, tuple(map(str, names))), tuple(specs), _program_example(program, specs), notes=note, program=program
    )


def _program_example(program: torch.export.ExportedProgram, specs: list[TensorSpec]) -> Tensors | None:
    import torch
    from torch.utils import _pytree as pytree

    given: Any = program.example_inputs  # None when the file was saved without them
    if given is None:
        return None
    leaves = pytree.tree_leaves(given)
    if len(leaves) != len(specs) or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return None
    return {spec.name: leaf.detach() for spec, leaf in zip(specs, leaves, strict=True)}


def _by_name(program: torch.export.ExportedProgram, names: tuple[str, ...]) -> torch.nn.Module:
    """A module that takes the program's inputs by name, whichever were positional when it was exported."""
    import torch
    from torch.utils import _pytree as pytree

    structure = program.call_spec.in_spec

    class ByName(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.program = program.module()

        def forward(self, **feeds: torch.Tensor) -> Any:
            args, kwargs = pytree.tree_unflatten([feeds[name] for name in names], structure)
            return self.program(*args, **kwargs)

    return ByName()


def _refuse_code(file: Path) -> None:
    import torch

    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.namelist():
                inside = entry.partition("/")[2]
                if inside.startswith("data/constants/") and Path(inside).name.startswith(("custom_obj", "opaque_obj")):
                    raise ModelError(
                        f"{file.name} holds a pickled object ({inside}): refused", "export it without custom objects"
                    )
                data = archive.read(entry)
                if not data.startswith(b"PK") and not inside.startswith("data/sample_inputs/"):
                    continue
                try:
                    torch.load(io.BytesIO(data), weights_only=True)
                except pickle.UnpicklingError as exc:
                    raise ModelError(
                        f"{file.name} holds a pickle that would run code when loaded ({inside}): refused",
                        "export it again with plain tensors as inputs",
                    ) from exc
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError) as exc:
        raise ModelError(
            f"{file.name} is not an ExportedProgram, or it is truncated", "save it again with torch.export.save"
        ) from exc
