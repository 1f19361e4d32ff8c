"""PyTorch eager, as a user runs it: FP32 and contiguous is the reference; BF16 autocast and dynamic INT8 beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploykit import machine
from deploykit.artifact import Artifact
from deploykit.backends import installed, opened, torch_source
from deploykit.errors import BackendFailed, MissingBackend
from deploykit.session import LAYOUTS, BuildRequest, Missing, OpenRequest, Session

NAME = "torch"
_PRECISIONS = ("fp32", "bf16", "int8-dynamic")


class TorchEager:
    """The backend 'torch'."""

    name = NAME
    opening_s = 5.0
    extra = "torch"
    layouts = LAYOUTS

    def missing(self) -> Missing | None:
        """Why PyTorch is not here; None when it is."""
        return installed.missing("torch", self.extra)

    def cannot_run(self) -> Missing | None:
        """The same as `missing`: it runs on any CPU."""
        return self.missing()

    def versions(self) -> dict[str, str]:
        """The installed torch."""
        return torch_source.versions()

    def precisions(self) -> tuple[str, ...]:
        """fp32, and dynamic INT8 where this torch still has quantize_dynamic; bf16 when asked for."""
        return ("fp32", "int8-dynamic") if _has_quantize_dynamic() else ("fp32",)

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """Static INT8 and FP16 (graphs of the other backends), bf16 on a CPU without it, any target but 'cpu'."""
        if precision not in _PRECISIONS:
            return Missing(
                f"PyTorch eager has no {precision} here: it is written into ONNX graphs", "use onnxruntime or openvino"
            )
        if precision == "bf16":
            return without_bf16() or installed.only_cpu("PyTorch", target)
        if precision == "int8-dynamic" and self.missing() is None and not _has_quantize_dynamic():
            return Missing("this torch no longer has quantize_dynamic", "use onnxruntime's int8-dynamic")
        return installed.only_cpu("PyTorch", target)

    def targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def all_targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def graph(self, precision: str) -> str:  # noqa: ARG002 - the same for all
        """The PyTorch source itself."""
        return "source"

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """The source's description; the module is made from it when a session opens."""
        return torch_source.copy(artifact, request, folder, f"build-{NAME}", self.versions())

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """The module in eval mode. Raises MissingBackend for dynamic INT8 of a model without Linear layers."""
        opened.require_batch(engine.signature, request)
        source = torch_source.load(engine)
        laid_out = torch_source.lay_out(source.module, request)
        step: Callable[..., Any] = source.module
        notes: tuple[str, ...] = ()
        if request.precision == "bf16":
            step, notes = autocast(step), ("autocast to BF16, weights kept in FP32",)
        elif request.precision == "int8-dynamic":
            step, notes = _quantized(source.module)
        names = source.output_names
        return torch_source.TorchSession(step, names, engine.signature, request, request.precision, (*notes, *laid_out))


def autocast(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` under BF16 autocast.

    On a ResNet-18 eager takes 21.2 ms so and 20.4 ms with the weights cast once (`module.to(bfloat16)`); compiled it is
    the faster of the two, and it keeps normalisations and reductions in FP32, as users of it know it.
    """
    import torch

    def run(**tensors: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return step(**tensors)

    return run


def without_bf16() -> Missing | None:
    """Why BF16 makes no sense on this CPU; None when it computes in it."""
    if {"avx512_bf16", "amx_bf16"} & machine.features():
        return None
    return Missing("this CPU has neither AVX-512 BF16 nor AMX", "use fp32, or a newer CPU")


def _has_quantize_dynamic() -> bool:
    """Whether torch has torch.ao.quantization.quantize_dynamic (deprecated there), found without importing torch."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("torch")
        places = [] if spec is None else spec.submodule_search_locations or []
        return any((Path(place) / "ao" / "quantization" / "quantize.py").is_file() for place in places)
    return False


def _quantized(module: Any) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The module with its Linear layers in dynamic INT8, and how many that are."""
    import torch

    linear = sum(type(m) is torch.nn.Linear for m in module.modules())
    other = sum(isinstance(m, torch.nn.modules.conv._ConvNd) for m in module.modules())
    if not linear:
        raise MissingBackend(
            "the model has no Linear layer, and PyTorch's dynamic INT8 quantizes nothing else",
            "use static int8 on another backend",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of torchao, which is no dependency of ours
            quantize = torch.ao.quantization.quantize_dynamic
            quantized = quantize(module, {torch.nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    except Exception as exc:
        raise BackendFailed(f"PyTorch's quantize_dynamic failed: {opened.first_line(exc)}", "leave int8-dynamic out") from exc
    whole = linear + other
    rest = f", {other} convolutions stay in FP32" if other else ""
    return quantized, (f"{linear} of {whole} convolution and Linear layers run in dynamic INT8{rest}",)


BACKEND = TorchEager()
