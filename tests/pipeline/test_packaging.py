"""What `deploykit package` writes runs by itself, and what makes no sense is refused with what does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from deploykit import backends, graph
from deploykit.artifact import Artifact
from deploykit.errors import InputError, UnknownName
from deploykit.pipeline import package_text, packaging
from deploykit.pipeline.packaging import PackageRequest, package
from deploykit.pipeline.platforms import PLATFORMS, RUNTIMES, require
from deploykit.preprocess import Preprocess
from deploykit.session import BuildRequest
from deploykit.signature import Signature, TensorSpec

PREPROCESS = "resize=8,crop=8,mean=0.5/0.4/0.3,std=0.2/0.3/0.4"


class Quiet:
    """A narrator that says nothing."""

    def step(self, what: str) -> None: ...

    def progress(self, what: str, share: float) -> None: ...


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An ONNX Runtime engine of a small convolutional net, as `build` delivers it."""
    folder = tmp_path_factory.mktemp("engine")
    path = tiny_models.conv_net(folder / "net.onnx")
    given = Artifact(path, "onnx", "fp32", graph.signature(graph.load(path)), "given").save()
    out = folder / "built"
    out.mkdir()
    made = backends.get("onnxruntime").build(given, BuildRequest("fp32"), out)
    return replace(made, stage="engine", options={"backend": "onnxruntime", "model": "net"}).save()


def _fake(backend: str, precision: str = "int8", device: str = "cpu") -> Artifact:
    signature = Signature((TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch", 2)),))
    options = {"backend": backend, "model": "net"}
    return Artifact(Path("m"), backend, precision, signature, "engine", options=options, device=device)


def test_a_linux_package_runs_and_checks_itself_without_deploykit(engine: Artifact, tmp_path: Path) -> None:
    from PIL import Image

    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\n")
    picture = tmp_path / "picture.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (11, 13, 3), dtype=np.uint8)).save(picture)
    out = tmp_path / "package"
    request = PackageRequest("linux-x86", data=str(picture), preprocess=PREPROCESS, classes=names)
    made = package(engine.path, request, out, Quiet())
    assert {"engine.py", "run.py", "check.py", "README.md", "requirements.txt", "model/expected.npz"} <= set(made.files)
    assert any(note.startswith("check.py here: passed") for note in made.notes)

    blocked = (
        "import sys, runpy\nsys.modules['deploykit'] = None\nsys.argv = sys.argv[1:]\nsys.path.insert(0, '.')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", blocked, *command], cwd=out, capture_output=True, text=True, check=False)

    checked = run("check.py")
    assert checked.returncode == 0, checked.stderr
    shown = run("run.py", str(picture), "--top", "1")
    assert shown.returncode == 0, shown.stderr
    with np.load(out / "model" / "expected.npz") as cases:
        best = int(cases["out/logits"][0, 0].argmax())
    assert names.read_text().split()[best] in shown.stdout, "the example preprocesses pictures as deploykit does"

    arrays = dict(np.load(out / "model" / "expected.npz"))
    arrays["out/logits"] = arrays["out/logits"] * 1.1
    np.savez(out / "model" / "expected.npz", **arrays)
    wrong = run("check.py")
    assert wrong.returncode == 1
    assert "FAILED" in wrong.stdout


@pytest.mark.parametrize("platform", ["android", "ios"])
def test_a_phone_package_holds_sources_and_raw_cases(engine: Artifact, platform: str, tmp_path: Path) -> None:
    out = tmp_path / "package"
    made = package(engine.path, PackageRequest(platform, cases=2), out, Quiet())
    suffix = {"android": "kt", "ios": "swift"}[platform]
    assert {f"Engine.{suffix}", f"OnDevice.{suffix}", "model/cases/1.out.0.bin"} <= set(made.files)
    facts = json.loads((out / "model" / "model.json").read_text())
    assert (out / "model" / facts["file"]).read_bytes() == engine.path.read_bytes()
    with np.load(out / "model" / "expected.npz") as cases:
        for kind, name in (("in", "x"), ("out", "logits")):
            raw = np.fromfile(out / "model" / "cases" / f"1.{kind}.0.bin", dtype="<f4")
            assert np.array_equal(raw, cases[f"{kind}/{name}"][1].ravel())
    assert any("random" in note for note in made.notes)
    assert not (out / "model" / "preprocess.json").exists()


def test_a_package_replaces_an_older_one_and_nothing_else(engine: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "package"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="no package of deploykit's"):
        package(engine.path, PackageRequest("ios", cases=1), out, Quiet())
    assert [p.name for p in tmp_path.iterdir()] == ["package"]
    (out / "mine.txt").unlink()
    package(engine.path, PackageRequest("ios", cases=1), out, Quiet())
    package(engine.path, PackageRequest("ios", cases=2), out, Quiet())
    assert json.loads((out / "model" / "model.json").read_text())["cases"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["package"]


def test_every_runtime_has_the_files_of_its_platforms() -> None:
    import deploykit.on_device

    place = Path(deploykit.on_device.__file__).parent
    for name, runtime in RUNTIMES.items():
        for platform in runtime.platforms:
            file = {"android": f"{name}.kt", "ios": f"{name}.swift"}.get(platform, f"engine_{name}.py")
            assert (place / file).is_file(), f"{name} for {platform}"


@pytest.mark.parametrize(
    ("backend", "platform", "says"),
    [
        ("openvino", "ios", "ExecuTorch int8 runs there"),
        ("openvino", "android", "--backend executorch --precision int8"),
        ("tvm", "android", "runs there"),
        ("torch", "linux-arm", "ExecuTorch int8 runs there"),
        ("tensorrt-rtx", "linux-x86", "runs there"),
    ],
)
def test_a_combination_without_sense_names_the_closest(backend: str, platform: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        require(_fake(backend), backend, platform)
    assert says in str(caught.value)


def test_a_library_made_on_an_arm_board_is_one_for_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    board = replace(_fake("tvm", "fp32"), facts={"triple": "aarch64-unknown-linux-gnu"})
    assert require(board, "tvm", "linux-arm").title == "Apache TVM"
    with pytest.raises(InputError, match="aarch64"):
        require(board, "tvm", "linux-x86")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert require(_fake("tvm", "fp32"), "tvm", "linux-arm").title == "Apache TVM"


def test_a_library_goes_to_the_processor_it_was_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert require(_fake("tvm", "fp32"), "tvm", "linux-x86").title == "Apache TVM"
    assert require(_fake("tvm", "fp32", "linux-arm64"), "tvm", "linux-arm").title == "Apache TVM"
    with pytest.raises(InputError, match="x86_64"):
        require(_fake("tvm", "fp32"), "tvm", "linux-arm")
    with pytest.raises(InputError, match="linux-arm64"):
        require(_fake("tvm", "fp32", "linux-arm64"), "tvm", "linux-x86")


def test_an_unknown_platform_is_named_with_the_choices() -> None:
    with pytest.raises(UnknownName, match="did you mean 'android'"):
        require(_fake("litert"), "litert", "androit")
    assert len(PLATFORMS) == 4


def _tflite(batch: int | str = "batch", inputs: tuple[str, ...] = ("x",), **facts: object) -> Artifact:
    signature = Signature(
        tuple(TensorSpec(name, "float32", (batch, 3)) for name in inputs), (TensorSpec("y", "float32", (batch, 2)),)
    )
    options = {"backend": "litert", "model": "net"}
    return Artifact(Path("m.tflite"), "litert", "fp32", signature, "engine", options=options, facts=facts)


def test_kotlin_gets_no_batch_that_it_would_have_to_resize_to() -> None:
    any_batch, of_four = {"0": "m.tflite"}, {"1": "m.tflite", "4": "m-batch4.tflite"}
    packaging._require_kotlin(_tflite(files=any_batch), 1)
    packaging._require_kotlin(_tflite(files=of_four), 4)
    packaging._require_kotlin(_tflite(4, files={"4": "m.tflite"}), 4)
    with pytest.raises(InputError, match="--batch 1"):
        packaging._require_kotlin(_tflite(files=any_batch), 4)
    with pytest.raises(InputError, match="several inputs"):
        packaging._require_kotlin(_tflite(inputs=("a", "b"), files=any_batch), 1)


def test_swift_gets_the_files_own_order() -> None:
    arrays = {"a": np.zeros(1), "b": np.zeros(2)}
    engine = _tflite(inputs=("a", "b"))
    ordered = replace(engine, facts={"inputs": [{"name": "b"}, {"name": "a"}]})
    assert list(packaging._in_file_order(ordered, "inputs", arrays)) == ["b", "a"]
    with pytest.raises(InputError, match="which order"):
        packaging._in_file_order(engine, "inputs", arrays)


@pytest.mark.parametrize(
    ("shape", "layout"), [(("batch", 8, 8), None), (("batch", 8, 8, 3), "nhwc"), (("batch", 3, 8, 8), "nchw")]
)
def test_preprocess_json_has_the_inputs_layout_or_is_not_there(
    shape: tuple[int | str, ...], layout: str | None, tmp_path: Path
) -> None:
    engine = replace(_tflite(), signature=Signature((TensorSpec("x", "float32", shape),), ()))
    notes = packaging._write_preprocess(engine, Preprocess(layout=layout or "nchw"), tmp_path)
    written = tmp_path / "preprocess.json"
    assert written.is_file() == (layout is not None) == (not notes)
    if layout is not None:
        assert json.loads(written.read_text())["layout"] == layout


def test_outputs_that_are_no_class_scores_are_said_so(engine: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "package"
    made = package(engine.path, PackageRequest("linux-x86", cases=1, preprocess=PREPROCESS), out, Quiet())
    assert "model/preprocess.json" in made.files
    facts = json.loads((out / "model" / "model.json").read_text())
    facts["outputs"][0]["shape"].append(5)
    (out / "model" / "model.json").write_text(json.dumps(facts))
    ran = subprocess.run([sys.executable, "run.py", "any.png"], cwd=out, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "no class scores" in ran.stderr and "Traceback" not in ran.stderr


def test_the_words_speak_of_pictures_only_where_they_go_in() -> None:
    engine, runtime = _tflite(), RUNTIMES["litert"]
    for platform in PLATFORMS:
        with_, without = (
            package_text.readme(engine, "litert", runtime, platform, images=images, classes=True) for images in (True, False)
        )
        assert "preprocess" in with_ and "preprocess" not in without
    assert "run.py" not in package_text.readme(engine, "litert", runtime, "linux-arm", images=True, classes=False)


def test_phones_take_floats_only(tmp_path: Path) -> None:
    path = tiny_models.two_inputs(tmp_path / "two.onnx")
    with pytest.raises(InputError, match="float32 only"):
        package(path, PackageRequest("android"), tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


def test_the_digest_is_that_of_the_file_which_runs() -> None:
    engine = replace(
        _tflite(files={"1": "m.tflite", "4": "m-batch4.tflite"}), sha256="a" * 64, companions={"m-batch4.tflite": "b" * 64}
    )
    arrays = {"x": np.zeros((1, 4, 3), np.float32)}
    for batch, file, digest in ((1, "m.tflite", "a" * 64), (4, "m-batch4.tflite", "b" * 64)):
        facts = packaging._facts(engine, "litert", PackageRequest("ios", batch), batch, arrays, arrays)
        assert (facts["file"], facts["sha256"]) == (file, digest)
