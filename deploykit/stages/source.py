"""A user's model, loaded: module, example inputs, signature, preprocessing. Runs in a child process (it imports torch)."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.children import report_progress
from deploykit.errors import InputError, ModelError
from deploykit.preprocess import Preprocess
from deploykit.signature import Dim, Signature, TensorSpec
from deploykit.source_spec import BATCH, SourceSpec

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]
EXAMPLE_BATCH = 2
DEFAULT_IMAGE = TensorSpec("x", "float32", (BATCH, 3, 224, 224))


@dataclass(frozen=True)
class Parts:
    """What a kind of source yields before it has been run once. `example`: values to feed, at any batch, or None."""

    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    example: Tensors | None = None
    preprocess: Preprocess | None = None
    classes: tuple[str, ...] | None = None
    local_files: Mapping[str, str] = field(default_factory=dict)
    output_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    guessed_input: bool = False
    program: torch.export.ExportedProgram | None = None


@dataclass(frozen=True)
class Source:
    """A model ready to run: eval mode, FP32, on the CPU.

    module: called as module(**feeds) with tensors named after the signature's inputs; example: one feed at batch 2 (a fixed
    batch: at that); local_files: the factory's own modules, path relative to its folder -> sha256; program: the
    ExportedProgram of a .pt2.
    """

    module: torch.nn.Module
    example: Tensors
    signature: Signature
    preprocess: Preprocess | None
    classes: tuple[str, ...] | None
    local_files: Mapping[str, str]
    notes: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    program: torch.export.ExportedProgram | None = None

    def run(self, feeds: Mapping[str, torch.Tensor]) -> Tensors:
        """The module's outputs by name, flattened out of dicts, tuples and dataclasses, without gradients."""
        import torch

        with torch.no_grad():
            return named_outputs(self.module(**feeds), tuple(feeds), self.output_names)

    def feeds(self, batch: int, *, seed: int = 0, grown: bool = False) -> Tensors:
        """Inputs at `batch` made from the example: its samples in turn, floats varied by 25 % noise from `seed`.
        With `grown` the other dynamic axes are longer than in the example."""
        return vary(self.example, self.signature, batch, seed=seed, grown=grown)


def load(spec: SourceSpec, *, fresh_head: bool = False) -> Source:
    """The model that `spec` describes, run once at batch 2 and once at 3 to learn its outputs.

    Weights 'none' means the library's own initialisation from seed 0, so that every process makes the same model.
    `fresh_head`: a checkpoint whose last layer has another number of classes is taken for the layers before it (to train).
    Raises ModelError for a model that cannot be made or run (its own exception and line named), UnknownName for a name,
    InputError when weights would have to be downloaded and there is no network.
    """
    from deploykit.stages import source_files, source_keras, source_library

    report_progress(f"loading {spec.name}", 0.0)
    if spec.kind == "onnx":
        raise ModelError(f"{spec.name} is an .onnx file: it has no PyTorch module to run", "name the model it was exported from")
    _require_torch(spec)
    if spec.kind == "torchvision":
        parts = source_library.torchvision_model(spec, fresh_head=fresh_head)
    elif spec.kind == "timm":
        parts = source_library.timm_model(spec, fresh_head=fresh_head)
    elif spec.kind == "pt2":
        parts = source_files.exported_program(spec)
    elif spec.kind == "keras":
        parts = source_keras.keras_file(spec, fresh_head=fresh_head)
    else:
        parts = source_files.factory_model(spec, fresh_head=fresh_head)
    return _probe(parts, spec)


def _require_torch(spec: SourceSpec) -> None:
    from deploykit.children import has_module
    from deploykit.errors import MissingBackend

    for package in spec.versions():
        if not has_module(package):
            extra = package if package in ("timm", "keras") else "torch"
            raise MissingBackend(f"{package} is not installed, and {spec.text} needs it", f"pip install 'deploykit[{extra}]'")


def _probe(parts: Parts, spec: SourceSpec) -> Source:
    """Runs the module to see that it runs, what it returns, and which axes of that follow the batch."""
    import torch

    module, notes = parts.module, list(parts.notes)
    if parts.program is None:
        low = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
        if low:
            notes.append(f"parameters in {', '.join(sorted(str(d).removeprefix('torch.') for d in low))} were made float32")
        module = module.float().cpu().eval()
    draft = Signature(parts.inputs, ())
    batch = draft.fixed_batch or EXAMPLE_BATCH
    example = vary(parts.example, draft, batch, noise=0.0) if parts.example else examples(draft, batch)
    source = Source(
        module,
        example,
        draft,
        parts.preprocess,
        parts.classes,
        parts.local_files,
        tuple(notes),
        parts.output_names,
        parts.program,
    )
    try:
        first = source.run(example)
    except Exception as exc:
        shown = ", ".join(map(str, draft.inputs))
        hint = "say what it takes with --input NAME:DTYPE:SHAPE" if parts.guessed_input else "check --input or example_inputs"
        raise ModelError(f"{spec.name} does not run on {shown}: {where(exc)}", hint) from exc
    if not first:
        raise ModelError(f"{spec.name} returns no tensor", "return a tensor, or a dict or tuple of them")
    if len(parts.output_names) not in (0, len(first)):
        raise ModelError(f"{spec.name} returns {len(first)} tensors, OUTPUTS names {len(parts.output_names)}", "name each once")
    outputs = _output_specs(source, first, spec) if draft.batch_symbol else [_fixed(n, t) for n, t in first.items()]
    signature = Signature(draft.inputs, tuple(outputs), draft.batch_symbol)
    return Source(
        module,
        example,
        signature,
        parts.preprocess,
        parts.classes,
        parts.local_files,
        tuple(notes),
        parts.output_names,
        parts.program,
    )


def _output_specs(source: Source, first: Tensors, spec: SourceSpec) -> list[TensorSpec]:
    try:
        second = source.run(source.feeds(EXAMPLE_BATCH + 1))
    except Exception as exc:
        raise ModelError(
            f"{spec.name} runs at batch {EXAMPLE_BATCH} but not at {EXAMPLE_BATCH + 1}: its batch is baked in, or an input's batch"
            f" axis is another one; {where(exc)}",
            "take the batch from the input (x.shape[0]), or name the batch axis with --input NAME:DTYPE:SHAPE",
        ) from exc
    third = None
    if any(source.signature.free_axes(s) for s in source.signature.inputs):
        try:
            third = source.run(source.feeds(EXAMPLE_BATCH, grown=True))
        except Exception as exc:
            raise ModelError(
                f"{spec.name} does not run when its dynamic axes change size: {where(exc)}",
                "give those axes a fixed size in --input",
            ) from exc
    result = []
    for name, tensor in first.items():
        if second[name].ndim != tensor.ndim:
            raise ModelError(f"output '{name}' changes its rank with the batch", "return tensors of a fixed rank")
        dims: list[Dim] = []
        for axis, size in enumerate(tensor.shape):
            follows = third is not None and third[name].shape[axis] != size
            dims.append(_dim(source, f"{name}.{axis}", size, second[name].shape[axis], follows=follows))
        result.append(TensorSpec(name, _dtype(tensor), tuple(dims)))
    return result


def _dim(source: Source, label: str, at_two: int, at_three: int, *, follows: bool) -> Dim:
    if follows:
        for spec in source.signature.inputs:
            for axis, dim in enumerate(spec.shape):
                if dim in source.signature.free_axes(spec) and source.example[spec.name].shape[axis] == at_two == at_three:
                    return dim
        return label
    if at_two == at_three:
        return at_two
    if (at_two, at_three) == (EXAMPLE_BATCH, EXAMPLE_BATCH + 1):
        return source.signature.batch_symbol or BATCH
    if at_two * (EXAMPLE_BATCH + 1) == at_three * EXAMPLE_BATCH:
        return f"{at_two // EXAMPLE_BATCH}*{source.signature.batch_symbol}"
    return label


def _fixed(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, _dtype(tensor), tuple(tensor.shape))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def named_outputs(outputs: Any, inputs: tuple[str, ...], names: tuple[str, ...] = ()) -> Tensors:
    """The tensors in what a module returned, by name: `names` when given; a dict's keys or a dataclass's fields; a tuple's are
    output_0, output_1, ...; a single one is 'logits' where it is float [batch, classes], else output_0. A name that an
    input has too gets '_out'."""
    import torch
    from torch.utils import _pytree as pytree

    leaves = [(path, leaf) for path, leaf in pytree.tree_flatten_with_path(outputs)[0] if isinstance(leaf, torch.Tensor)]
    result: Tensors = {}
    for position, (path, tensor) in enumerate(leaves):
        if len(names) == len(leaves):
            name = names[position]
        elif not path:
            name = "logits" if tensor.ndim == 2 and tensor.is_floating_point() else "output_0"
        else:
            keys = [str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", "")))) for key in path]
            name = re.sub(r"\W+", "_", "_".join(keys))
            name = f"output_{name}" if name[:1].isdigit() else name
        if name in inputs:
            name += "_out"
        while name in result:
            name += "_2"
        result[name] = tensor
    return result


def examples(signature: Signature, batch: int) -> Tensors:
    """Seeded inputs: normal floats, integers of 0 and 1 (valid as a token, a class or a mask), 0..255 for uint8.
    Dynamic axes beside the batch are 64, 96, ... for inputs of rank 4 and more, else 8, 9, ..."""
    import torch

    generator = torch.Generator().manual_seed(0)
    free = sorted({dim for spec in signature.inputs for dim in signature.free_axes(spec)})
    images = {dim for spec in signature.inputs if len(spec.shape) >= 4 for dim in signature.free_axes(spec)}
    sizes = {dim: 64 + 32 * i if dim in images else 8 + i for i, dim in enumerate(free)}
    result: Tensors = {}
    for spec in signature.inputs:
        shape = [d if isinstance(d, int) else batch if d == signature.batch_symbol else sizes[d] for d in spec.shape]
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            result[spec.name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            high = 256 if dtype == torch.uint8 else 2
            result[spec.name] = torch.randint(0, high, shape, generator=generator).to(dtype)
    return result


def vary(
    example: Tensors, signature: Signature, batch: int, *, seed: int = 0, noise: float = 0.25, grown: bool = False
) -> Tensors:
    """`example` brought to `batch` along each input's batch axis by taking its samples in turn; see `Source.feeds`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    result: Tensors = {}
    for spec in signature.inputs:
        tensor = example[spec.name]
        for axis, dim in enumerate(spec.shape):
            size = tensor.shape[axis]
            if dim == signature.batch_symbol:
                want = batch
            elif isinstance(dim, str) and grown:
                want = size + (32 if size % 32 == 0 else 1)
            else:
                continue
            tensor = tensor.index_select(axis, torch.arange(want) % size)
        if noise and tensor.is_floating_point():
            tensor = tensor * (1 + noise * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        result[spec.name] = tensor.contiguous()
    return result


def where(exc: BaseException) -> str:
    """'Type: message (file:line in function: code)' of an exception, at the innermost frame outside PyTorch and
    deploykit, which is the user's own line."""
    text = " ".join(str(exc).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    frame = user_frame(traceback.extract_tb(exc.__traceback__))
    return f"{type(exc).__name__}: {text}" + (f" ({frame})" if frame else "")


def user_frame(frames: traceback.StackSummary) -> str | None:
    """'file:line in function: code' of the innermost frame that is not PyTorch's, deploykit's or Python's own."""
    import torch

    own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), str(Path(traceback.__file__).parent))
    for frame in reversed(frames):
        third_party = "site-packages" in frame.filename
        if frame.filename.startswith(own[:2]) or frame.filename.startswith("<"):
            continue
        if frame.filename.startswith(own[2]) and not third_party:
            continue
        return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return None


def count_parameters(module: torch.nn.Module) -> int:
    """How many numbers the parameters hold."""
    return sum(math.prod(p.shape) for p in module.parameters())


def require_input(spec: SourceSpec, names: tuple[str, ...]) -> None:
    """Raises InputError unless every --input names a parameter of the model's forward."""
    for given in spec.inputs:
        if names and given.name not in names:
            raise InputError(
                f"--input '{given.name}': the model's forward has no such parameter", f"it takes: {', '.join(names)}"
            )
