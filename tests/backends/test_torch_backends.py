"""PyTorch rows: eager is the reference, dynamic INT8 says what it touched, compiling needs a compiler and says so."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import engine_cases as cases
import numpy as np
import pytest
import torch

from deploykit import artifact as artifacts
from deploykit import backends, machine
from deploykit.artifact import Artifact
from deploykit.backends import torch_compile, torch_compile_package, torch_eager, torch_source
from deploykit.errors import BackendFailed, DeploykitError, InputError, MissingBackend, ModelError
from deploykit.session import BuildRequest, OpenRequest
from deploykit.signature import Signature, TensorSpec

EAGER, COMPILED = torch_eager.BACKEND, torch_compile.BACKEND
BF16_HERE = bool(machine.features() & {"avx512_bf16", "amx_bf16"})


def test_bf16_autocast_rounds_and_keeps_the_outputs_dtype(tmp_path: Path) -> None:
    if not BF16_HERE:
        pytest.skip("this CPU has neither AVX-512 BF16 nor AMX")
    fp32 = cases.model("conv_net", tmp_path)
    session = EAGER.open(cases.engine(EAGER, fp32, "bf16", tmp_path), OpenRequest("bf16", 2, 1))
    inputs = cases.feeds(fp32.signature, 2)
    found = session.infer(inputs)["logits"]
    assert found.dtype == np.float32
    wanted = cases.expected(EAGER, "bf16", fp32, tmp_path, inputs)["logits"]
    assert 1e-5 < cases.distance(found, wanted) < 0.04
    assert session.precision == "bf16"


def test_dynamic_int8_says_how_little_it_touches(tmp_path: Path) -> None:
    fp32 = cases.model("conv_net", tmp_path)
    session = EAGER.open(cases.engine(EAGER, fp32, "int8-dynamic", tmp_path), OpenRequest("int8-dynamic", 1, 1))
    assert session.notes == ("1 of 3 convolution and Linear layers run in dynamic INT8, 2 convolutions stay in FP32",)


def test_dynamic_int8_without_a_linear_layer_is_a_skip_with_the_reason(tmp_path: Path) -> None:
    fp32 = cases.model("two_inputs", tmp_path)
    engine = cases.engine(EAGER, fp32, "int8-dynamic", tmp_path)
    with pytest.raises(MissingBackend, match="no Linear layer"):
        EAGER.open(engine, OpenRequest("int8-dynamic", 1, 1))


def test_dynamic_int8_is_not_offered_by_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "int8-dynamic" in EAGER.precisions()
    monkeypatch.setattr(torch_eager, "_has_quantize_dynamic", lambda: False)
    assert EAGER.precisions() == ("fp32",)
    assert EAGER.unsupported("int8-dynamic", "cpu") is not None


def test_the_thread_count_is_the_one_asked_for(tmp_path: Path) -> None:
    fp32 = cases.model("conv_net", tmp_path)
    engine = cases.engine(EAGER, fp32, "fp32", tmp_path)
    for threads in (2, 1):
        assert EAGER.open(engine, OpenRequest("fp32", 1, threads)).threads == threads == torch.get_num_threads()


def test_a_model_that_fails_while_running_is_the_backends_failure(tmp_path: Path) -> None:
    fp32 = cases.model("two_inputs", tmp_path)
    session = EAGER.open(cases.engine(EAGER, fp32, "fp32", tmp_path), OpenRequest("fp32", 1, 1))
    feeds = cases.feeds(fp32.signature, 1)
    feeds["ids"] = feeds["ids"] + 100  # past the end of the table
    with pytest.raises(BackendFailed, match="index"):
        session.infer(feeds)


def test_an_output_the_module_does_not_have_is_named(tmp_path: Path) -> None:
    fp32 = cases.model("conv_net", tmp_path)
    engine = cases.engine(EAGER, fp32, "fp32", tmp_path)
    cut = Signature(engine.signature.inputs, (TensorSpec("relu_3", "float32", ("batch", 8)),))
    with pytest.raises(ModelError, match="relu_3"):
        EAGER.open(Artifact(engine.path, "source", "fp32", cut, "test"), OpenRequest("fp32", 1, 1))


def test_an_onnx_file_has_no_pytorch_row(tmp_path: Path) -> None:
    for backend in (EAGER, COMPILED):
        with pytest.raises(ModelError, match="runs PyTorch models"):
            backend.build(cases.model("conv_net", tmp_path), BuildRequest("fp32"), tmp_path)


def test_an_exported_program_runs(tmp_path: Path) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    path = tmp_path / "m.pt2"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(Doubled(), (torch.zeros(2, 3),), dynamic_shapes={"x": {0: batch}}), str(path))
    signature = Signature((TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("logits", "float32", ("batch", 3)),))
    out = tmp_path / "out"
    out.mkdir()
    engine = EAGER.build(Artifact(path, "pt2", "fp32", signature, "test").save(), BuildRequest("fp32"), out).save()
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    np.testing.assert_array_equal(EAGER.open(engine, OpenRequest("fp32", 3, 1)).infer({"x": x})["logits"], x * 2)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A compiled engine for batch 2: each takes ten seconds."""
    if (missing := COMPILED.missing()) is not None:
        pytest.skip(f"torch.compile: {missing}")
    folder = tmp_path_factory.mktemp("compiled")
    return cases.engine(COMPILED, cases.model("conv_net", folder), "fp32", folder, batches=(2,))


def _compiles(*_: object) -> None:
    raise BackendFailed("compiling now")


def test_a_compiled_model_gives_the_models_outputs_at_its_batch_only(
    compiled: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_source, "load", _compiles)  # a package needs no source
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for threads in (1, 2):
        session = COMPILED.open(artifacts.load(compiled.path), OpenRequest("fp32", 2, threads))
        assert session.threads == threads == torch.get_num_threads()
        inputs = cases.feeds(compiled.signature, 2)
        wanted = cases.expected(COMPILED, "fp32", cases.model("conv_net", tmp_path), tmp_path, inputs)["logits"]
        assert cases.distance(session.infer(inputs)["logits"], wanted) < 1e-5
        with pytest.raises(InputError, match="opened at 2"):
            session.infer(cases.feeds(compiled.signature, 3))
    assert not [path for path in tmp_path.iterdir() if "inductor" in path.name or path.name.startswith("deploykit-")]


def test_what_no_package_was_compiled_for_is_compiled_when_opened(compiled: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compile, "_now", _compiles)
    fits = OpenRequest("fp32", 2, 1)
    COMPILED.open(compiled, fits)
    for engine, request in (
        (compiled, replace(fits, batch=1)),
        (compiled, replace(fits, precision="bf16")),
        (compiled, replace(fits, options={"layout": "channels-last"})),
        (replace(compiled, versions={"torch": "1.0"}), fits),
        (replace(compiled, facts={**compiled.facts, "cpu_features": ["avx1024"]}), fits),
    ):
        with pytest.raises(BackendFailed, match="compiling now"):
            COMPILED.open(engine, request)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    COMPILED.open(compiled, fits)  # no compiler is needed
    with pytest.raises(MissingBackend, match="compiler"):
        COMPILED.open(compiled, replace(fits, batch=1))


def test_what_no_package_can_hold_is_compiled_in_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (missing := COMPILED.missing()) is not None:
        pytest.skip(f"torch.compile: {missing}")
    monkeypatch.setattr(torch_compile_package, "compile_to", _fails)
    fp32 = cases.model("conv_net", tmp_path)
    engine = cases.engine(COMPILED, fp32, "fp32", tmp_path, batches=(2,))
    assert not engine.companions
    session = COMPILED.open(engine, OpenRequest("fp32", 2, 1))
    assert session.notes == ("compiled when it was opened (no package: cannot be packaged)",)
    inputs = cases.feeds(fp32.signature, 2)
    wanted = cases.expected(COMPILED, "fp32", fp32, tmp_path, inputs)["logits"]
    assert cases.distance(session.infer(inputs)["logits"], wanted) < 1e-5


def _fails(*_: object, **__: object) -> None:
    raise BackendFailed("cannot be packaged")


def test_a_sweeps_batches_are_not_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compile, "_compile", _compiles)
    engine = cases.engine(COMPILED, cases.model("conv_net", tmp_path), "fp32", tmp_path, batches=(1, 2, 4, 8, 16))
    assert not engine.companions
    assert not engine.facts.get("packages")


def test_compiling_needs_a_compiler_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = COMPILED.missing()
    assert missing is not None
    assert "C++ compiler" in missing.why
    assert "g++" in missing.remedy
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang++" if name == "clang++" else None)
    assert torch_compile.compiler() == "clang++"


def test_compiling_needs_pythons_headers_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(torch_compile.sysconfig, "get_path", lambda name: str(tmp_path))
    missing = COMPILED.missing()
    assert missing is not None
    assert "Python.h" in missing.why
    (tmp_path / "Python.h").touch()
    assert COMPILED.missing() is None


def test_precisions_it_does_not_have_are_refused() -> None:
    for backend in (EAGER, COMPILED):
        for precision in ("fp16", "int8", "mixed"):
            assert backend.unsupported(precision, "cpu") is not None
        assert backend.unsupported("fp32", "sm75") is not None
        assert backend.unsupported("fp32", "cpu") is None
    assert COMPILED.unsupported("int8-dynamic", "cpu") is not None


def test_a_damaged_description_is_one_error(tmp_path: Path) -> None:
    signature = cases.model("conv_net", tmp_path).signature
    path = tmp_path / "source.json"
    for text in ("", "{", "[]", '{"kind": "nonsense"}'):
        path.write_text(text)
        with pytest.raises(DeploykitError):
            EAGER.open(Artifact(path, "source", "fp32", signature, "test"), OpenRequest("fp32", 1, 1))


def test_channels_last_gives_the_same_outputs_and_says_so(tmp_path: Path) -> None:
    fp32 = cases.model("conv_net", tmp_path)
    engine, inputs = cases.engine(EAGER, fp32, "fp32", tmp_path), cases.feeds(fp32.signature, 2)
    usual = EAGER.open(engine, OpenRequest("fp32", 2, 1))
    session = EAGER.open(engine, OpenRequest("fp32", 2, 1, options={"layout": "channels-last"}))
    assert session.notes == ("filters and activations channels-last",)
    assert usual.notes == ()
    for name, wanted in usual.infer(inputs).items():
        np.testing.assert_allclose(session.infer(inputs)[name], wanted, rtol=1e-4, atol=1e-5)


def test_channels_last_reaches_every_filter() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
    assert torch_source.lay_out(module, OpenRequest("fp32", 1, 1)) == ()
    assert not module[1].weight.is_contiguous(memory_format=torch.channels_last)
    torch_source.lay_out(module, OpenRequest("fp32", 1, 1, options={"layout": "channels-last"}))
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("backend", "expected"), [("torch", {"layout": "channels-last"}), ("openvino", {"streams": 2})])
def test_only_what_a_backend_can_do_is_asked_of_it(backend: str, expected: dict[str, object]) -> None:
    assert backends.opening_options(backend, 2, "channels-last") == expected
    assert backends.opening_options(backend, 1, "channels-first") == backends.opening_options(backend, None, None) == {}
