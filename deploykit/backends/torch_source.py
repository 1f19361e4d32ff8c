"""A PyTorch source as the engine of a session: what eager and compiled rows share."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deploykit import source_spec
from deploykit.artifact import Artifact
from deploykit.backends import installed, opened
from deploykit.errors import BackendFailed, DeploykitError, ModelError
from deploykit.session import LAYOUTS, BuildRequest, OpenRequest
from deploykit.signature import Feeds, Outputs, Signature
from deploykit.source_spec import SourceSpec

if TYPE_CHECKING:
    import torch

# The source stage loads the module. Backends import no stage, so its place is a name looked up when a session opens, as
# the line that hands a source to this backend does not reach into the child where it is opened.
LOADER = "deploykit.stages.source"


class LoadedSource(Protocol):
    """What this needs of a loaded source: a module in eval mode on the CPU, called with tensors by input name."""

    @property
    def module(self) -> torch.nn.Module:
        """FP32, eval mode."""
        ...

    @property
    def signature(self) -> Signature:
        """The module's own inputs and outputs."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names that the source gives its outputs; empty for the default ones."""
        ...

    @property
    def example(self) -> dict[str, torch.Tensor]:
        """One feed by input name."""
        ...

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The module's outputs by name."""
        ...


def load(engine: Artifact) -> LoadedSource:
    """The module that an engine of format 'source' (a SourceSpec in JSON) or 'pt2' describes.

    Raises ModelError for a file that describes none, and what the source stage raises.
    """
    loaded: LoadedSource = importlib.import_module(LOADER).load(spec_in(engine.path))
    known = {s.name for s in loaded.signature.outputs}
    wanted = [s.name for s in engine.signature.outputs]
    if not set(wanted) <= known:
        raise ModelError(
            f"the PyTorch model gives {sorted(known)}, not {sorted(set(wanted) - known)}",
            "outputs cut out of the exported graph have no PyTorch row; name outputs of the model itself",
        )
    return loaded


def positional(source: LoadedSource, signature: Signature) -> torch.nn.Module:
    """The module with the signature's inputs by position and just its outputs, in order: what converters trace, since their
    files know no names."""
    import torch

    named_outputs = importlib.import_module(LOADER).named_outputs
    inputs = tuple(s.name for s in signature.inputs)
    outputs = tuple(s.name for s in signature.outputs)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = source.module

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = named_outputs(self.model(**dict(zip(inputs, tensors, strict=True))), inputs, source.output_names)
            return tuple(found[name] for name in outputs)

    return Positional().eval()


def lay_out(module: torch.nn.Module, request: OpenRequest) -> tuple[str, ...]:
    """Brings the module's filters into the layout asked for (`options['layout']`), and says so; activations follow the filters,
    from the first convolution on, whose input is converted in each call."""
    import torch

    if request.options.get("layout", LAYOUTS[0]) == LAYOUTS[0]:
        return ()
    module.to(memory_format=torch.channels_last)
    return ("filters and activations channels-last",)


def at_shapes(example: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """`example` brought to those shapes, its elements taken in turn along each axis."""
    import torch

    result: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        tensor = example[name]
        for axis, size in enumerate(shape):
            tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
        result[name] = tensor.contiguous()
    return result


def spec_in(path: Path) -> SourceSpec:
    """The source that an engine's description or a .pt2 names. Raises ModelError where it is none."""
    if path.suffix == ".pt2":
        return source_spec.parse(str(path))
    try:
        doc = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path.name} is not the description of a PyTorch source", "build it again from the source") from exc
    return SourceSpec.from_json(doc)


def copy(artifact: Artifact, request: BuildRequest, folder: Path, stage: str, versions: Mapping[str, str]) -> Artifact:
    """The engine of a PyTorch row: the source's description (or the .pt2), copied into `folder` once it has been read."""
    if artifact.format not in ("source", "pt2"):
        raise ModelError(f"{artifact.path.name} is {artifact.format}, and this backend runs PyTorch models", "give the source")
    spec_in(artifact.path)
    path = folder / artifact.path.name
    shutil.copyfile(artifact.path, path)
    return Artifact(
        path=path,
        format=artifact.format,
        precision=request.precision,
        signature=artifact.signature,
        stage=stage,
        parent=artifact.sha256 or None,
        options={**artifact.options, "precision": request.precision},
        versions=versions,
        facts=artifact.facts,
    )


class TorchSession:
    """A callable on tensors by input name, in inference mode, on `request.threads` threads."""

    def __init__(
        self,
        step: Callable[..., Any],
        output_names: tuple[str, ...],
        signature: Signature,
        request: OpenRequest,
        precision: str,
        notes: tuple[str, ...] = (),
        *,
        static: bool = False,
    ) -> None:
        import torch

        torch.set_num_threads(request.threads)
        self._step: Callable[..., Any] | None = step
        self._request = request
        self._static = static
        self._given = output_names
        self.signature = signature
        self.precision = precision
        self.device = "cpu"
        self.threads = torch.get_num_threads()
        self.notes = notes

    def infer(self, feeds: Feeds) -> Outputs:
        """Outputs by name, copied. Raises InputError for feeds that do not fit, BackendFailed when the model fails."""
        named = importlib.import_module(LOADER).named_outputs(self.bind(feeds)(), tuple(feeds), self._given)
        result: Outputs = {}
        for spec in self.signature.outputs:
            array = named[spec.name].detach()
            result[spec.name] = np.array((array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy())
            result[spec.name] = result[spec.name].astype(spec.dtype, copy=False)
        return result

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """One call of the module on tensors that share the arrays' memory; on a CPU its outputs lie on the host."""
        import torch

        step = self._step
        if step is None:
            raise BackendFailed("this PyTorch session is closed", "open the engine again")
        arrays = opened.ready(self.signature, self._request, feeds, static=self._static)
        tensors = {name: torch.from_numpy(a if a.flags.writeable else a.copy()) for name, a in arrays.items()}
        mode = torch.inference_mode

        def run() -> object:
            try:
                with mode():
                    return step(**tensors)
            except Exception as exc:
                raise failed(exc) from exc

        return run

    def close(self) -> None:
        """Frees the module; a second time does nothing."""
        self._step = None


def failed(exc: Exception) -> DeploykitError:
    """A model's own exception as an error with its message."""
    if isinstance(exc, DeploykitError):
        return exc
    return BackendFailed(
        f"the PyTorch model failed while running: {type(exc).__name__}: {opened.first_line(exc)}", "check the inputs' values"
    )


def versions() -> dict[str, str]:
    """The installed torch."""
    return installed.versions("torch")
