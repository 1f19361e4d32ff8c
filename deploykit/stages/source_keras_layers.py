"""A Keras graph run by PyTorch's own layers: images NCHW inside, so that an export has no transpose around each convolution.

Keras on PyTorch's backend transposes before and after each convolution and writes a normalisation as five operators: a
ResNet-18 has 62 permutes so and one here, and its normalisations fold into the convolutions. A layer that has no
counterpart here stays Keras's own, in Keras's layout.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# By the name of Keras's function: torch.nn.functional's of the same formula.
ACTIVATIONS = {
    "relu": "relu",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "silu": "silu",
    "swish": "silu",
    "hard_silu": "hardswish",
    "hard_swish": "hardswish",
    "hard_sigmoid": "hardsigmoid",
    "elu": "elu",
    "softplus": "softplus",
}


@dataclass(frozen=True)
class Image:
    """A tensor that Keras has as [n, h, w, c], held as [n, c, h, w]."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class Step:
    """What a layer does to values (tensors in Keras's layout, or Images), and the module that holds its weights and mode.

    keras: whether it is Keras's own layer, which takes keywords beside them.
    """

    run: Callable[..., Any]
    module: torch.nn.Module | None = None
    keras: bool = False


@dataclass(frozen=True)
class Same:
    """TensorFlow's 'same' padding: ceil(size / stride) outputs, the odd pixel at the end (tf.nn, 'Notes on padding')."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def amounts(self, image: torch.Tensor) -> tuple[int, int, int, int]:
        """(left, right, top, bottom), as torch's pad takes them, for an image [n, c, h, w]."""
        both = []
        for size, kernel, stride, dilation in zip(image.shape[2:], self.kernel, self.stride, self.dilation, strict=True):
            reach = (kernel - 1) * dilation + 1
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            both.append((total // 2, total - total // 2))
        (top, bottom), (left, right) = both
        return left, right, top, bottom


def to_keras(value: Any) -> Any:
    """The tensor in Keras's layout."""
    return value.tensor.permute(0, 2, 3, 1) if isinstance(value, Image) else value


def to_image(value: Any) -> torch.Tensor:
    """A rank-4 value as [n, c, h, w]."""
    tensor: torch.Tensor = value.tensor if isinstance(value, Image) else value.permute(0, 3, 1, 2)
    return tensor


def graph(model: Any) -> tuple[Callable[..., Any], torch.nn.ModuleDict, tuple[str, ...]]:
    """(a function of the inputs in Keras's layout and order, the modules it runs, the layers that stay Keras's own) of a
    Functional model."""
    import keras
    import torch

    steps: dict[int, Step] = {}
    modules = torch.nn.ModuleDict()
    kept: list[str] = []
    for position, operation in enumerate(model.operations):
        if type(operation).__name__ == "InputLayer":
            continue
        step = native(operation)
        if step is None:
            kept.append(f"{operation.name} ({type(operation).__name__})")
            step = _kept(operation)
        steps[id(operation)] = step
        if step.module is not None:
            # not the layer's name: the number in conv2d_50 counts all that this process has made
            modules[f"{position}_{type(operation).__name__}"] = step.module

    def call(step: Step, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("training", None)  # the module's own mode says it
        return step.run(*args, **kwargs) if step.keras else step.run(*args)  # a mask is None, or the outputs will differ

    def run(*inputs: torch.Tensor) -> Any:
        found = model._run_through_graph(list(inputs), operation_fn=lambda operation: steps[id(operation)], call_fn=call)
        return keras.tree.map_structure(to_keras, found)

    return run, modules, tuple(kept)


def native(layer: Any) -> Step | None:
    """What computes the same in PyTorch; None for a layer without a counterpart here."""
    place = type(layer).__module__.split(".")
    if place[0] != "keras" or getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    makers = _OPERATOR_MAKERS if "ops" in place else _MAKERS  # Add is the name of a layer and of the operator
    maker = makers.get(type(layer).__name__)
    return None if maker is None else maker(layer)


def _kept(operation: Any) -> Step:
    """A Keras layer as it is (a torch module under this backend, weights and all), or an operation of keras.ops."""
    import keras
    import torch

    method = getattr(operation, "call", None)
    trains = method is not None and "training" in inspect.signature(method).parameters
    module = operation if isinstance(operation, torch.nn.Module) else None

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = keras.tree.map_structure(to_keras, (args, kwargs))
        if trains and module is not None:
            kwargs["training"] = module.training
        return operation(*args, **kwargs)

    return Step(run, module, keras=True)


def _activation(function: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    from torch.nn import functional

    name = getattr(function, "__name__", "")
    if not getattr(function, "__module__", "").startswith("keras."):
        return None
    if name == "linear":
        return lambda x: x
    found: Callable[[torch.Tensor], torch.Tensor] | None = getattr(functional, ACTIVATIONS[name]) if name in ACTIVATIONS else None
    return found


def _elementwise(function: Callable[[torch.Tensor], torch.Tensor], module: torch.nn.Module | None = None) -> Step:
    def run(value: Any) -> Any:
        return Image(function(value.tensor)) if isinstance(value, Image) else function(value)

    return Step(run, module)


def _merge(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
    """A layer of that function: it takes one list of values."""
    return Step(lambda values, *_: _merged(function, values))


def _operator(function: Callable[[Any, Any], torch.Tensor]) -> Step:
    """The operator of that function (x + y, keras.ops.add): it takes two values, of which one may be a number."""
    return Step(lambda left, right: _merged(function, (left, right)))


def _merged(function: Callable[[Any, Any], torch.Tensor], values: Sequence[Any]) -> Any:
    """The values put together from left to right: as images where one is an Image and no value has another rank."""
    numbers = [isinstance(v, int | float) for v in values]
    images = any(isinstance(v, Image) for v in values) and all(
        number or isinstance(v, Image) or getattr(v, "ndim", 0) == 4 for v, number in zip(values, numbers, strict=True)
    )
    result, *others = [v if number else to_image(v) if images else to_keras(v) for v, number in zip(values, numbers, strict=True)]
    for other in others:
        result = function(result, other)
    return Image(result) if images else result


def _on_image(module: torch.nn.Module, same: Same | None = None, then: Callable[..., torch.Tensor] | None = None) -> Step:
    from torch.nn import functional

    def run(value: Any) -> Image:
        image = to_image(value)
        if same is not None:
            image = functional.pad(image, same.amounts(image))
        result = module(image)
        return Image(result if then is None else then(result))

    return Step(run, module)


def _convolution(layer: Any) -> Step | None:
    import torch

    then = _activation(layer.activation)
    if then is None or getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return None
    kernel = _values(layer.kernel)
    if type(layer).__name__ == "DepthwiseConv2D":  # [h, w, in, multiplier] -> [in * multiplier, 1, h, w]
        weight, groups = kernel.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1), kernel.shape[2]
    else:  # [h, w, in / groups, out] -> [out, in / groups, h, w]
        weight, groups = kernel.permute(3, 2, 0, 1), layer.groups
    size = (weight.shape[2], weight.shape[3])
    made = torch.nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        size,
        tuple(layer.strides),
        dilation=tuple(layer.dilation_rate),
        groups=groups,
        bias=layer.use_bias,
    )
    _set(made.weight, weight)
    if made.bias is not None:
        _set(made.bias, _values(layer.bias))
    return _on_image(made, Same(size, layer.strides, layer.dilation_rate) if layer.padding == "same" else None, then)


def _normalisation(layer: Any) -> Step | None:
    """BatchNormalization over the last axis, of images or of vectors."""
    import torch

    axis = layer.axis[0] if isinstance(layer.axis, list | tuple) else layer.axis
    mean = _values(layer.moving_mean)
    rank = len(layer.input.shape) if len(layer._inbound_nodes) == 1 else 0
    if rank not in (2, 4) or axis not in (-1, rank - 1):
        return None
    make = torch.nn.BatchNorm2d if rank == 4 else torch.nn.BatchNorm1d
    made = make(len(mean), eps=layer.epsilon, momentum=1 - layer.momentum)  # Keras: the share that stays; torch: the new one
    _set(made.weight, _values(layer.gamma) if layer.scale else torch.ones_like(mean))
    _set(made.bias, _values(layer.beta) if layer.center else torch.zeros_like(mean))
    assert made.running_mean is not None
    assert made.running_var is not None
    made.running_mean.copy_(mean)
    made.running_var.copy_(_values(layer.moving_variance))
    return _on_image(made) if rank == 4 else Step(made, made)


def _dense(layer: Any) -> Step | None:
    import torch

    softmax = getattr(layer.activation, "__name__", "") == "softmax"
    then = (lambda x: torch.softmax(x, -1)) if softmax else _activation(layer.activation)
    if then is None or getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return None
    kernel = _values(layer.kernel)
    made = torch.nn.Linear(kernel.shape[0], kernel.shape[1], bias=layer.use_bias)
    _set(made.weight, kernel.T)
    if layer.use_bias:
        _set(made.bias, _values(layer.bias))
    return Step(lambda value: then(made(to_keras(value))), made)


def _max_pool(layer: Any) -> Step:
    """With 'same' padding, where only the odd pixel is missing, the last window is cut short instead: no padding of -inf then
    stands between INT8 layers."""
    import torch
    from torch.nn import functional

    kernel, stride = tuple(layer.pool_size), tuple(layer.strides)
    if layer.padding == "valid":
        return _on_image(torch.nn.MaxPool2d(kernel, stride))
    same = Same(kernel, stride, (1, 1))

    def run(value: Any) -> Image:
        image = to_image(value)
        left, right, top, bottom = same.amounts(image)
        if (left, top) == (right, bottom):
            return Image(functional.max_pool2d(image, kernel, stride, (top, left)))
        if (left, top) == (0, 0):
            return Image(functional.max_pool2d(image, kernel, stride, ceil_mode=True))
        padded = functional.pad(image, (left, right, top, bottom), value=-math.inf)
        return Image(functional.max_pool2d(padded, kernel, stride))

    return Step(run)


def _average_pool(layer: Any) -> Step | None:
    import torch

    return _on_image(torch.nn.AvgPool2d(layer.pool_size, layer.strides)) if layer.padding == "valid" else None


def _zero_padding(layer: Any) -> Step:
    import torch

    (top, bottom), (left, right) = layer.padding
    return _on_image(torch.nn.ZeroPad2d((left, right, top, bottom)))


def _relu(layer: Any) -> Step | None:
    from torch.nn import functional

    if layer.negative_slope or layer.threshold or layer.max_value not in (None, 6):
        return None
    return _elementwise(functional.relu if layer.max_value is None else functional.relu6)


def _activated(layer: Any) -> Step | None:
    function = _activation(layer.activation)
    return None if function is None else _elementwise(function)


def _rescaling(layer: Any) -> Step | None:
    scale, offset = layer.scale, layer.offset
    if not isinstance(scale, int | float) or not isinstance(offset, int | float):
        return None
    return _elementwise(lambda x: x.float() * scale + offset)


def _global_mean(layer: Any) -> Step:
    def run(value: Any) -> Any:
        mean = to_image(value).mean((2, 3), keepdim=bool(layer.keepdims))
        return Image(mean) if layer.keepdims else mean

    return Step(run)


def _dropout(layer: Any) -> Step:
    import torch

    made = torch.nn.Dropout(float(layer.rate))
    return _elementwise(made, made)


def _add(_: Any) -> Step:
    return _merge(lambda a, b: a + b)


def _multiply(_: Any) -> Step:
    return _merge(lambda a, b: a * b)


def _flatten(_: Any) -> Step:
    return Step(lambda value: to_keras(value).flatten(1))


_MAKERS: dict[str, Callable[[Any], Step | None]] = {
    "Conv2D": _convolution,
    "DepthwiseConv2D": _convolution,
    "BatchNormalization": _normalisation,
    "Dense": _dense,
    "MaxPooling2D": _max_pool,
    "AveragePooling2D": _average_pool,
    "GlobalAveragePooling2D": _global_mean,
    "ZeroPadding2D": _zero_padding,
    "ReLU": _relu,
    "Activation": _activated,
    "Rescaling": _rescaling,
    "Add": _add,
    "Multiply": _multiply,
    "Flatten": _flatten,
    "Dropout": _dropout,
}
_OPERATOR_MAKERS: dict[str, Callable[[Any], Step | None]] = {
    "Add": lambda _: _operator(lambda a, b: a + b),
    "Multiply": lambda _: _operator(lambda a, b: a * b),
}


def _values(variable: Any) -> torch.Tensor:
    tensor: torch.Tensor = variable.value.detach().clone().float()
    return tensor


def _set(parameter: torch.Tensor, value: torch.Tensor) -> None:
    import torch

    with torch.no_grad():
        parameter.copy_(value)
