"""Keras models, from a .keras file or a factory, as PyTorch modules that keep Keras's layout: images are [n, h, w, c].

Keras 3 runs on PyTorch, and a .keras file saved under TensorFlow loads there: no TensorFlow is needed, and every backend
that takes a PyTorch source takes a Keras one. On a ResNet-18 saved under TensorFlow the outputs differ by 1.2e-7.
"""

from __future__ import annotations

import json
import keyword
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import InputError, ModelError
from deploykit.signature import Dim, TensorSpec
from deploykit.source_spec import BATCH, SourceSpec
from deploykit.stages import source_keras_layers
from deploykit.stages.source import Parts, where
from deploykit.stages.source_library import apply_checkpoint

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4  # of the largest output: the same sums in another order give 1e-7, another padding 1e-2
_UNNAMED = re.compile(r"(keras_tensor|input_layer|input)(_\d+)?")
# Classes whose descriptions hold code: by name, what they are.
_CODE = {
    "Lambda": "Lambda layer",
    "__lambda__": "Lambda layer",
    "TorchModuleWrapper": "pickled PyTorch module",
    "TFSMLayer": "TensorFlow program",
    "JaxLayer": "JAX function",
    "FlaxLayer": "Flax module",
}
_MOST_BYTES = 64 << 20  # of a description in a .keras file; the largest of keras.applications has 1 MB


def use_torch() -> None:
    """Has Keras, once it is imported, run on PyTorch, whatever ~/.keras/keras.json says."""
    os.environ["KERAS_BACKEND"] = "torch"


def keras_file(spec: SourceSpec, *, fresh_head: bool) -> Parts:
    """The model in a .keras file, whichever backend saved it.

    Raises ModelError for a damaged file, and for one that holds code (a Lambda layer) or classes of another package: it is
    read without running any of it.
    """
    file = spec.file
    assert file is not None
    _refuse_code(file)
    use_torch()
    import keras

    try:
        model = keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as exc:  # ValueError, TypeError, KeyError, OSError, h5py's: by what is damaged or not allowed
        text = " ".join(str(exc).split())
        if "unsafe" in text or "safe_mode" in text:
            raise _code(file, text[:200]) from exc
        if "Could not locate" in text or "could not be deserialized" in text:
            raise _foreign(file, text[:200]) from exc
        raise ModelError(
            f"{file.name} cannot be loaded: {type(exc).__name__}: {text[:200]}", "save it again with Keras 3"
        ) from exc
    return of_model(spec, model, fresh_head=fresh_head)


def is_model(value: Any) -> bool:
    """Whether a factory returned a Keras model. Raises ModelError for one on another backend than PyTorch's."""
    keras = sys.modules.get("keras")
    if keras is None or not isinstance(value, keras.Model):
        return False
    if keras.config.backend() != "torch":
        raise ModelError(
            f"the factory has Keras run on {keras.config.backend()}, and deploykit runs it on PyTorch",
            "leave KERAS_BACKEND alone in the file; deploykit sets it",
        )
    return True


def of_model(spec: SourceSpec, model: Any, *, fresh_head: bool) -> Parts:
    """A Keras model as a module of PyTorch's own layers where that gives Keras's outputs, else as Keras runs it.

    Inputs are named after the model's, or x (x_0, x_1, ...) where Keras made a name up.
    """
    import torch

    if not model.built or not getattr(model, "inputs", None):
        raise ModelError(f"{spec.name}: the Keras model has no inputs yet", "give it an Input, or build it with an input shape")
    inputs = _inputs(model)
    names = tuple(s.name for s in inputs)
    whole = _named(lambda *tensors: model(_packed(model, tensors), training=False), names, {"model": model})
    module, notes = whole, [f"Keras model: its inputs keep Keras's layout ({', '.join(map(str, inputs))})"]
    if spec.inputs and [s.name for s in spec.inputs] != list(names):
        raise InputError(f"--input: the Keras model takes {', '.join(map(str, inputs))}", "use those names")
    example = _example(spec.inputs or inputs)
    try:
        run, modules, kept = source_keras_layers.graph(_functional(model))
        faster = _named(run, names, dict(modules.items()))
        if _same(faster, whole, example):
            module = faster
            if kept:
                notes.append(f"layers that stay Keras's own: {', '.join(kept[:5])}" + (", ..." if len(kept) > 5 else ""))
        else:
            notes.append(
                "PyTorch's layers gave other outputs than Keras's: the model runs as Keras runs it, with more transposes"
            )
    except Exception as exc:  # a graph of a kind not known here: Keras's own way is the one to keep
        notes.append(f"the model runs as Keras runs it, with more transposes ({where(exc)})")
    module = module.eval()
    notes += apply_checkpoint(spec, module, fresh_head=fresh_head)
    outputs = list(getattr(model, "output_names", ()) or ()) if len(getattr(model, "outputs", ()) or ()) > 1 else []
    return Parts(
        module,
        spec.inputs or inputs,
        example={name: torch.as_tensor(value) for name, value in example.items()},
        output_names=tuple(_identifier(name) for name in outputs) if len(set(outputs)) == len(outputs) else (),
        notes=tuple(notes),
    )


def _functional(model: Any) -> Any:
    """The Functional graph of a model; a Sequential one holds it. Raises ModelError for a subclassed model."""
    inner = getattr(model, "_functional", None) or model
    if not hasattr(inner, "_run_through_graph") or not hasattr(inner, "operations"):
        raise ModelError(f"{type(model).__name__} is no Functional or Sequential model")
    return inner


def _packed(model: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    import keras

    structure = getattr(_functional_or_none(model), "_inputs_struct", None)
    if structure is None:
        return tensors[0] if len(tensors) == 1 else list(tensors)
    return keras.tree.pack_sequence_as(structure, list(tensors))


def _functional_or_none(model: Any) -> Any:
    inner = getattr(model, "_functional", None) or model
    return inner if hasattr(inner, "_inputs_struct") else None


def _inputs(model: Any) -> tuple[TensorSpec, ...]:
    """The model's inputs: axis 0 is the batch unless the model fixes it, other unknown axes are dynamic."""
    given = [_identifier(str(tensor.name)) for tensor in model.inputs]
    made_up = any(_UNNAMED.fullmatch(name) for name in given) or len(set(given)) != len(given)
    single = len(given) == 1
    result = []
    for position, tensor in enumerate(model.inputs):
        name = ("x" if single else f"x_{position}") if made_up else given[position]
        dims: list[Dim] = [
            int(size) if size is not None else BATCH if axis == 0 else f"{name}_{axis}" for axis, size in enumerate(tensor.shape)
        ]
        result.append(TensorSpec(name, str(tensor.dtype), tuple(dims)))
    return tuple(result)


def _identifier(name: str) -> str:
    """The name as a parameter of the forward that `_named` writes: no keyword, and neither of the names it uses itself."""
    text = re.sub(r"\W", "_", name)
    return text if text.isidentifier() and not keyword.iskeyword(text) and text not in ("self", "run") else f"x_{text}"


def _named(run: Callable[..., Any], names: tuple[str, ...], modules: dict[str, torch.nn.Module]) -> torch.nn.Module:
    """A module whose forward takes tensors by those names, in that order, and which holds `modules`.

    The forward is written out with its parameters: torch.export 2.14 cannot convert the guards it writes for **kwargs.
    """
    import torch

    class KerasModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, module in modules.items():
                self.add_module(name, module)

    scope: dict[str, Any] = {"run": run}
    exec(f"def forward(self, {', '.join(names)}):\n    return run({', '.join(names)})", scope)  # names are identifiers
    KerasModel.forward = scope["forward"]
    return KerasModel()


def _example(inputs: tuple[TensorSpec, ...]) -> dict[str, torch.Tensor]:
    from deploykit.signature import Signature
    from deploykit.stages.source import EXAMPLE_BATCH, examples

    draft = Signature(inputs, ())
    return examples(draft, draft.fixed_batch or EXAMPLE_BATCH)


def _same(left: torch.nn.Module, right: torch.nn.Module, example: dict[str, torch.Tensor]) -> bool:
    import torch
    from torch.utils import _pytree as pytree

    with torch.no_grad():
        found, wanted = (pytree.tree_leaves(m.eval()(**example)) for m in (left, right))
    return len(found) == len(wanted) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * max(float(b.abs().max()), 1e-6)
        for a, b in zip(found, wanted, strict=True)
    )


def _refuse_code(file: Path) -> None:
    """Raises ModelError for a file that is no .keras, or whose description names code or classes from outside Keras.

    Keras's own safe_mode refuses a Lambda too; before 3.11.3 it could be talked out of it (CVE-2025-1550, CVE-2025-8747).
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entry = archive.getinfo("config.json")
            if entry.file_size > _MOST_BYTES:
                raise ModelError(f"{file.name}: its config.json has {entry.file_size} bytes", "no Keras model needs so many")
            nodes = list(_objects(json.loads(archive.read(entry))))
    except KeyError as exc:
        raise ModelError(f"{file.name} has no config.json: it is no .keras file", "save it with model.save('m.keras')") from exc
    except RecursionError as exc:
        raise ModelError(f"{file.name}: its config.json is nested too deep", "no Keras model needs so many levels") from exc
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as exc:
        raise ModelError(
            f"{file.name} is no .keras file, or it is truncated", "save it again with model.save('m.keras')"
        ) from exc
    for node in nodes:
        kind, module = node.get("class_name"), node.get("module")
        if isinstance(kind, str) and kind in _CODE:
            raise _code(file, f"a {_CODE[kind]}")
        if isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins", ""):
            raise _foreign(file, f"{module}.{kind}")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner)


def _code(file: Path, what: str) -> ModelError:
    return ModelError(
        f"{file.name} holds code that would run when it is loaded ({what}): refused",
        "rebuild that layer from Keras's own, or write a factory that builds the model (file.py:function)",
    )


def _foreign(file: Path, what: str) -> ModelError:
    return ModelError(
        f"{file.name} needs a class that is not Keras's own: {what}",
        "write a factory that builds the model, and name that: file.py:function",
    )
