"""Keras models as a source: the same outputs as Keras's own, a dynamic batch, NHWC kept, no code run from a file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deploykit import source_spec
from deploykit.children import has_module
from deploykit.errors import InputError, MissingBackend, ModelError
from deploykit.stages import source, source_keras, source_keras_layers

HERE = has_module("keras")
needs_keras = pytest.mark.skipif(not HERE, reason="keras is not installed: pip install 'deploykit[keras]'")

FACTORY = '''
import keras
from keras import layers


def residual_block(x, filters, stride=1):
    shortcut = x
    x = layers.Conv2D(filters, 3, strides=stride, padding="same")(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(x))
    if stride != 1 or shortcut.shape[-1] != filters:
        shortcut = layers.BatchNormalization()(layers.Conv2D(filters, 1, strides=stride)(shortcut))
    return layers.ReLU()(layers.Add()([x, shortcut]))


def resnet(num_classes=10):
    """A small ResNet as the articles build it: 'same' padding everywhere, softmax at the end."""
    inputs = layers.Input(shape=(32, 32, 3))
    x = layers.Conv2D(8, 7, strides=2, padding="same")(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.MaxPool2D(3, strides=2, padding="same")(x)
    for filters, stride in ((8, 1), (16, 2)):
        x = residual_block(residual_block(x, filters, stride), filters)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(num_classes, activation="softmax")(x))


def mixed():
    """Layers with and without a counterpart: LayerNormalization stays Keras's own, in the middle of images."""
    inputs = layers.Input(shape=(9, 7, 4), name="picture")
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, activation="relu6")(inputs)
    x = layers.LayerNormalization()(x)
    x = layers.AveragePooling2D(2)(x)
    x = layers.Dense(6, activation="tanh")(x)
    return keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.5)(layers.Flatten()(x))))


def two():
    a, b = layers.Input(shape=(4,), name="a"), layers.Input(shape=(4,), name="b")
    return keras.Model([a, b], {"total": layers.Add(name="total")([a, b]), "scaled": layers.Rescaling(2.0, name="scaled")(a)})


def operators():
    """A residual block with + and *, between images, with a number, and with an input that is no convolution's output."""
    inputs = layers.Input(shape=(8, 6, 3), name="lambda")
    x = layers.Conv2D(3, 3, padding="same")(inputs)
    x = layers.ReLU()(inputs + x * 0.5)
    scale = layers.Dense(3, activation="sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = keras.ops.add(1.0, layers.Conv2D(3, 1)(x * scale))
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))


def reserved():
    """Names that a Python function cannot give its parameters, or that ours uses itself."""
    first, second = layers.Input(shape=(4,), name="self"), layers.Input(shape=(4,), name="run")
    return keras.Model([first, second], layers.Subtract()([first, second]))


def unbuilt():
    return keras.Sequential([layers.Dense(3)])
'''


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keras") / "nets.py"
    path.write_text(FACTORY)
    return path


def _model(factory: Path, name: str) -> Any:
    source_keras.use_torch()
    scope: dict[str, Any] = {}
    exec(factory.read_text(), scope)
    import keras

    keras.utils.set_random_seed(3)
    model = scope[name]()
    for layer in model.layers:
        if "batch_normalization" in layer.name:  # statistics of a trained one
            layer.set_weights([w + 0.1 * (i + 1) for i, w in enumerate(layer.get_weights())])
    return model


@needs_keras
@pytest.mark.parametrize(("name", "kept"), [("resnet", 0), ("mixed", 1)])
def test_a_saved_model_gives_keras_own_outputs(name: str, kept: int, factory: Path, tmp_path: Path) -> None:
    import torch

    model = _model(factory, name)
    model.save(tmp_path / "m.keras")
    loaded = source.load(source_spec.parse(str(tmp_path / "m.keras")))
    spec = loaded.signature.inputs[0]
    assert spec.shape == ("batch", *model.inputs[0].shape[1:])
    assert spec.name == ("picture" if name == "mixed" else "x")
    for batch in (1, 7):
        feeds = loaded.feeds(batch, seed=batch)
        with torch.no_grad():
            wanted = model(feeds[spec.name], training=False)
        (found,) = loaded.run(feeds).values()
        assert torch.allclose(found, wanted, atol=1e-5)
    assert sum("stay Keras's own" in note for note in loaded.notes) == kept
    assert not any("runs as Keras runs it" in note for note in loaded.notes)


@needs_keras
def test_an_export_has_a_dynamic_batch_and_no_transpose_but_the_first(factory: Path, tmp_path: Path) -> None:
    import onnx

    from deploykit.stages import export

    made = export.to_onnx(
        source_spec.parse(f"{factory}:resnet"), tmp_path / "m.onnx", batches=(1, 2, 7), opset=None, outputs=None
    )
    assert made.signature.inputs[0].shape == ("batch", 32, 32, 3)
    operators = [node.op_type for node in onnx.load(made.path).graph.node]
    assert operators.count("Transpose") <= 1
    assert "BatchNormalization" not in operators and "Sub" not in operators


@needs_keras
def test_a_factory_makes_the_same_model_each_time(factory: Path) -> None:
    import torch

    spec = source_spec.parse(f"{factory}:resnet", num_classes=5)
    first, second = source.load(spec), source.load(spec)
    feeds = first.feeds(2)
    assert all(torch.equal(first.run(feeds)[k], second.run(feeds)[k]) for k in first.run(feeds))
    assert first.signature.outputs[0].shape == ("batch", 5)


@needs_keras
def test_several_inputs_and_outputs_keep_their_names(factory: Path) -> None:
    loaded = source.load(source_spec.parse(f"{factory}:two"))
    assert [s.name for s in loaded.signature.inputs] == ["a", "b"]
    feeds = loaded.feeds(3)
    found = loaded.run(feeds)
    assert set(found) == {"total", "scaled"}
    assert (found["total"] == feeds["a"] + feeds["b"]).all()


@needs_keras
def test_residuals_written_with_operators_run_on_pytorchs_layers(factory: Path) -> None:
    import torch

    model = _model(factory, "operators")
    run, modules, kept = source_keras_layers.graph(model)
    assert kept == ()
    assert [type(module).__name__ for module in modules.values()] == ["Conv2d", "Linear", "Conv2d", "Linear"]
    value = torch.randn(3, 8, 6, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(run(value), model(value, training=False), atol=1e-5)
    loaded = source.load(source_spec.parse(f"{factory}:operators"))
    assert [s.name for s in loaded.signature.inputs] == ["x_lambda"]
    assert not any("Keras's own" in note or "as Keras runs it" in note for note in loaded.notes)


@needs_keras
def test_inputs_named_like_our_own_variables_get_other_names(factory: Path) -> None:
    loaded = source.load(source_spec.parse(f"{factory}:reserved"))
    assert [s.name for s in loaded.signature.inputs] == ["x_self", "x_run"]
    feeds = loaded.feeds(3)
    (found,) = loaded.run(feeds).values()
    assert (found == feeds["x_self"] - feeds["x_run"]).all()


@needs_keras
def test_weights_that_finetune_wrote_fit(factory: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    loaded = source.load(source_spec.parse(f"{factory}:resnet"))
    save_file(
        {k: v + 0.01 if v.is_floating_point() else v for k, v in loaded.module.state_dict().items()}, tmp_path / "w.safetensors"
    )
    other = source.load(source_spec.parse(f"{factory}:resnet", weights=str(tmp_path / "w.safetensors")))
    feeds = loaded.feeds(2)
    assert not torch.allclose(*(m.run(feeds)[next(iter(m.run(feeds)))] for m in (loaded, other)))


@needs_keras
def test_a_model_without_inputs_is_refused(factory: Path) -> None:
    with pytest.raises(ModelError, match="no inputs yet"):
        source.load(source_spec.parse(f"{factory}:unbuilt"))


@needs_keras
def test_a_lambda_in_a_file_is_refused_and_never_runs(tmp_path: Path) -> None:
    source_keras.use_torch()
    import keras

    mark = tmp_path / "ran"
    inputs = keras.layers.Input(shape=(2,))
    outputs = keras.layers.Lambda(lambda x, mark=str(mark): (open(mark, "w").close(), x)[1], output_shape=(2,))(inputs)
    model = keras.Model(inputs, outputs)
    mark.unlink(missing_ok=True)
    model.save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match="holds code"):
        source.load(source_spec.parse(str(tmp_path / "m.keras")))
    assert not mark.exists()


def _written(path: Path, config: Any) -> source_spec.SourceSpec:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
    return source_spec.parse(str(path))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"module": "keras", "class_name": "Functional", "config": {"layers": [{"class_name": "Lambda"}]}}, "holds code"),
        ({"module": "keras", "class_name": "Functional", "config": [{"class_name": "__lambda__"}]}, "holds code"),
        ({"module": "keras.layers", "class_name": "TorchModuleWrapper", "config": {"module": "gASV"}}, "pickled PyTorch module"),
        ({"module": "keras.layers", "class_name": "TFSMLayer", "config": {"filepath": "model"}}, "holds code"),
        ({"module": "os", "class_name": "system", "config": {}}, "not Keras's own"),
    ],
)
def test_a_description_that_names_code_is_refused_before_keras_reads_it(config: Any, why: str, tmp_path: Path) -> None:
    spec = _written(tmp_path / "m.keras", config)
    assert spec.file is not None
    with pytest.raises(ModelError, match=why):
        source_keras._refuse_code(spec.file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x89HDF\r\n\x1a\n"])
def test_a_damaged_file_is_one_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"no \.keras file"):
        source_keras._refuse_code(path)


def test_the_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit import children

    monkeypatch.setattr(children, "has_module", lambda name: name != "keras")
    spec = _written(tmp_path / "m.keras", {})
    with pytest.raises(MissingBackend, match=r"deploykit\[keras\]"):
        source.load(spec)


def test_other_files_of_keras_are_named(tmp_path: Path) -> None:
    (tmp_path / "m.h5").write_bytes(b"")
    with pytest.raises(InputError, match="HDF5"):
        source_spec.parse(str(tmp_path / "m.h5"))
