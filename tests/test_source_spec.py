"""What SOURCE and its options mean, and what a source's digest depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit.errors import InputError, ModelError
from deploykit.signature import TensorSpec
from deploykit.source_spec import SourceSpec, changed_files, parse, parse_input


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("x:float32:batchx3x32x32", ("batch", 3, 32, 32)),
        ("x:float32:1x3x32x32", ("batch", 3, 32, 32)),
        ("x:float32:batch,3,height,width", ("batch", 3, "height", "width")),
        ("x:float32:1xbatchx8", (1, "batch", 8)),
        ("x:float32:scalar", ()),
    ],
)
def test_an_input_s_shape_is_read(text: str, shape: tuple[object, ...]) -> None:
    assert parse_input(text) == TensorSpec("x", "float32", shape)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x:1x3", "no dtype"),
        ("x", "NAME:DTYPE:SHAPE"),
        ("x:float33:1x3", "no dtype"),
        ("x:float32:1x-3", "neither"),
        ("x:float32:1x0", "size of 0"),
        ("x:str:1x3", "not a number"),
    ],
)
def test_a_bad_input_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_input(text)


def test_kinds_and_default_weights(tmp_path: Path) -> None:
    assert (parse("resnet18").kind, parse("resnet18").weights) == ("torchvision", "default")
    assert (parse("timm:resnet50.a1_in1k").kind, parse("timm:resnet50.a1_in1k").reference) == ("timm", "resnet50.a1_in1k")
    file = tmp_path / "net.py"
    file.write_text("def make(): ...")
    spec = parse(f"{file}:make")
    assert (spec.kind, spec.weights, spec.name, spec.reference) == ("factory", "none", "net", "make")
    assert SourceSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("net.weights9", InputError, "unknown suffix"),
        ("net.h5", InputError, "HDF5"),
        ("gone.onnx", ModelError, "no file"),
        ("gone.py:make", ModelError, "no file"),
        ("net.py", InputError, "factory"),
        ("weights.safetensors", InputError, "--weights"),
        ("", InputError, "empty"),
    ],
)
def test_a_bad_source_says_what_is_wrong(text: str, kind: type[InputError], said: str) -> None:
    with pytest.raises(kind) as caught:
        parse(text)
    assert said in str(caught.value)


def test_options_that_cannot_apply_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(b"x")
    with pytest.raises(InputError, match="--num-classes"):
        parse(str(file), num_classes=3)
    with pytest.raises(InputError, match="twice"):
        parse("resnet18", inputs=("x:float32:1x3", "x:float32:1x3"))
    with pytest.raises(ModelError, match="no file"):
        parse("resnet18", weights=str(tmp_path / "gone.pt"))


def test_the_digest_follows_content_not_place(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text("def make(): ...")
    first, second = (parse(f"{tmp_path / f / 'net.py'}:make") for f in ("a", "b"))
    assert first.digest() == second.digest()
    assert first.digest() != parse(f"{tmp_path / 'a' / 'net.py'}:make", num_classes=3).digest()
    (tmp_path / "b" / "net.py").write_text("def make(): return 1")
    assert first.digest() != second.digest()
    (tmp_path / "b" / "net.py").unlink()
    with pytest.raises(ModelError, match="no file"):
        second.digest()


def test_changed_files_are_named(tmp_path: Path) -> None:
    from deploykit.artifact import sha256_of

    net, part = tmp_path / "net.py", tmp_path / "part.py"
    net.write_text("import part")
    part.write_text("WIDTH = 1")
    files = {"net.py": sha256_of(net), "part.py": sha256_of(part)}
    spec = parse(f"{net}:make")
    assert changed_files(spec, files) == ()
    part.write_text("WIDTH = 2")
    assert changed_files(spec, files) == ("part.py",)
