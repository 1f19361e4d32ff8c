"""Models by name from torchvision and timm, with the preprocessing their weights were trained with."""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deploykit.errors import InputError, ModelError, UnknownName
from deploykit.preprocess import IMAGENET, Preprocess
from deploykit.signature import TensorSpec
from deploykit.source_spec import BATCH, SourceSpec
from deploykit.stages import source_checkpoint
from deploykit.stages.source import DEFAULT_IMAGE, Parts, require_input, where

if TYPE_CHECKING:
    import torch

SEED = 0
_FRESH = "the last layer ({}) was left at its seeded initialisation: train it before judging accuracy"


@contextmanager
def seeded() -> Iterator[None]:
    """Inside, torch's generator starts at SEED (and Python's and numpy's, which Keras's initialisers draw their seeds from), so
    that an initialisation is the same in every process."""
    import random

    import numpy as np
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def parameters_of(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the parameters that a module's forward takes, in order; *args and **kwargs left out."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds)


def make(spec: SourceSpec, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """What `build` makes from the fixed seed. Raises ModelError with the library's own reason when it cannot."""
    try:
        with seeded():
            return build()
    except Exception as exc:
        raise ModelError(f"{spec.text} could not be made: {where(exc)}", "check --num-classes and the model's name") from exc


def apply_checkpoint(spec: SourceSpec, module: torch.nn.Module, *, fresh_head: bool) -> tuple[str, ...]:
    """Loads the checkpoint that --weights names, if any; returns notes."""
    path = spec.checkpoint
    if path is None:
        return ()
    if not path.is_file():
        raise ModelError(f"there is no file {path}", "check --weights")
    state = source_checkpoint.read(path)
    if fresh_head and spec.num_classes is not None:
        left = source_checkpoint.fit_backbone(module, state, path.name)
        return (_FRESH.format(", ".join(left)),) if left else ()
    note = source_checkpoint.fit(module, state, path.name)
    return (note,) if note else ()


def torchvision_model(spec: SourceSpec, *, fresh_head: bool) -> Parts:
    """A torchvision model by name. Raises UnknownName, InputError for families that take lists of images."""
    from torchvision import models

    name = spec.reference
    known = models.list_models()
    if name not in known:
        import importlib.util

        extra = [f"timm:{n}" for n in _timm_names()] if importlib.util.find_spec("timm") else []
        raise UnknownName("model", name, [*known, *extra])
    if name in models.list_models(models.detection) or name.startswith("quantized_"):
        what = "takes a list of images and draws boxes" if not name.startswith("quantized_") else "is quantized already"
        raise InputError(
            f"torchvision's {name} {what}; deploykit takes models from tensors to tensors in floating point",
            "give its backbone and heads with a factory (file.py:factory), or a float model",
        )
    options: dict[str, Any] = {} if spec.num_classes is None else {"num_classes": spec.num_classes}
    if "init_weights" in inspect.signature(models.get_model_builder(name)).parameters or name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    if name in models.list_models(models.segmentation):
        options["weights_backbone"] = None
    module = make(spec, lambda: models.get_model(name, weights=None, **options))
    notes: tuple[str, ...] = ()
    transforms = None
    classes = None
    if spec.weights == "default":
        weights = models.get_model_weights(name).DEFAULT
        transforms = weights.transforms()
        state = _download(name, lambda: weights.get_state_dict(progress=False, check_hash=True))
        if spec.num_classes is None:
            classes = tuple(weights.meta["categories"]) if "categories" in weights.meta else None
            source_checkpoint.fit(module, {k: v for k, v in state.items() if k in module.state_dict()}, name)
        else:
            left = source_checkpoint.fit_backbone(module, state, name)
            notes = (_FRESH.format(", ".join(left)),) if left else ()
    else:
        notes = apply_checkpoint(spec, module, fresh_head=fresh_head)
        if spec.weights == "none":
            notes = (f"weights are torchvision's own initialisation from seed {SEED}: the model is not trained",)
    return _finish(spec, module, _torchvision_preset(name, transforms), classes, notes)


def _finish(
    spec: SourceSpec, module: torch.nn.Module, preset: Preprocess | None, classes: tuple[str, ...] | None, notes: tuple[str, ...]
) -> Parts:
    names = parameters_of(module)
    require_input(spec, names)
    size = preset.crop if preset is not None and preset.crop else 224
    inputs = spec.inputs or (TensorSpec(names[0], "float32", (BATCH, 3, size, size)),)
    image = (3, size, size)
    fits = len(inputs) == 1 and inputs[0].shape[1:] == image and inputs[0].dtype == DEFAULT_IMAGE.dtype
    return Parts(module, inputs, preprocess=preset if fits else None, classes=classes, notes=notes, guessed_input=not spec.inputs)


def _torchvision_preset(name: str, transforms: Any) -> Preprocess | None:
    """The classification preset: of the weights when they are torchvision's, else ImageNet's at 224."""
    from torchvision import models
    from torchvision.transforms._presets import ImageClassification

    if transforms is None:
        families = (models.detection, models.segmentation, models.video, models.optical_flow, models.quantization)
        return None if any(name in models.list_models(f) for f in families) else IMAGENET
    if not isinstance(transforms, ImageClassification):
        return None
    return replace(
        IMAGENET,
        resize=int(transforms.resize_size[0]),
        crop=int(transforms.crop_size[0]),
        mean=tuple(float(v) for v in transforms.mean),
        std=tuple(float(v) for v in transforms.std),
        interpolation=_interpolation(str(transforms.interpolation.value)),
    )


def _interpolation(name: str) -> str:
    return name if name in ("bilinear", "bicubic") else "bilinear"


def timm_model(spec: SourceSpec, *, fresh_head: bool) -> Parts:
    """A timm model by name, preprocessing from its pretrained_cfg. Raises UnknownName."""
    import timm
    import timm.data

    timm_data: Any = timm.data  # its names are re-exported untyped
    name = spec.reference
    if not timm.is_model(name.split(".")[0]):
        raise UnknownName("timm model", name, _timm_names())
    options: dict[str, Any] = {} if spec.num_classes is None else {"num_classes": spec.num_classes}
    notes: tuple[str, ...] = ()
    if spec.weights == "default":
        with _quick_hub(), seeded():
            module = _download(name, lambda: timm.create_model(name, pretrained=True, **options))
        if spec.num_classes is not None and spec.num_classes != module.pretrained_cfg.get("num_classes"):
            notes = (_FRESH.format(module.pretrained_cfg.get("classifier")),)
    else:
        module = make(spec, lambda: timm.create_model(name, pretrained=False, **options))
        notes = apply_checkpoint(spec, module, fresh_head=fresh_head)
        if spec.weights == "none":
            notes = (f"weights are timm's own initialisation from seed {SEED}: the model is not trained",)
    config: dict[str, Any] = timm_data.resolve_data_config(model=module)
    size = int(config["input_size"][-1])
    crop_share = config.get("crop_pct") or 1.0
    squash = config.get("crop_mode") == "squash"
    preset = Preprocess(
        resize=None if squash else int(size / crop_share),
        crop=None if squash else size,
        mean=tuple(float(v) for v in config["mean"]),
        std=tuple(float(v) for v in config["std"]),
        interpolation=_interpolation(config["interpolation"]),
    )
    channels = int(config["input_size"][0])
    names = parameters_of(module)
    require_input(spec, names)
    default = (TensorSpec(names[0], "float32", (BATCH, channels, size, size)),)
    inputs = spec.inputs or default
    return Parts(module, inputs, preprocess=preset if inputs == default else None, notes=notes, guessed_input=not spec.inputs)


def _timm_names() -> list[str]:
    import timm

    return list(timm.list_models())


def _download(name: str, fetch: Callable[[], Any]) -> Any:
    """What `fetch` returns. Raises InputError when its weights cannot be had."""
    from urllib.error import URLError

    try:
        return fetch()
    except (URLError, OSError, RuntimeError) as exc:
        # huggingface_hub's errors derive from OSError; RuntimeError: a hash that differs, or no pretrained weights.
        text = " ".join(str(exc).split())[:200]
        raise InputError(
            f"the weights of {name} could not be downloaded ({type(exc).__name__}: {text})",
            "no network? give a checkpoint with --weights PATH, or --weights none for an untrained model",
        ) from exc


@contextmanager
def _quick_hub() -> Iterator[None]:
    """Takes the hub for offline when its name cannot be resolved: its client would retry for 50 s (huggingface_hub 1.x).
    Cached weights are found either way. Behind a proxy names need not resolve, so nothing is assumed there."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        try:
            socket.getaddrinfo("huggingface.co", 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
