"""TVM: what it refuses and why, libraries of another machine, schedules, the search, and ARM under emulation."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_cases as cases
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploykit import artifact as artifacts
from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.backends import apache_tvm, apache_tvm_arm, apache_tvm_compile, apache_tvm_schedule, apache_tvm_tuning
from deploykit.errors import BackendFailed, InputError, MissingBackend
from deploykit.session import BuildRequest, OpenRequest
from deploykit.signature import Signature

BACKEND = backends.get("tvm")
needs_tvm = pytest.mark.skipif(BACKEND.missing() is not None, reason=str(BACKEND.missing()))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("tvm")
    return cases.engine(BACKEND, cases.model("conv_net", folder), "fp32", folder)


def _graph(path: Path, nodes: list[onnx.NodeProto], *, domain: str = "") -> Artifact:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    imports = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), str(path))
    return cases.artifact(path, "fp32")


@needs_tvm
def test_an_operator_without_a_converter_is_named_with_its_node(tmp_path: Path) -> None:
    graph = _graph(tmp_path / "m.onnx", [helper.make_node("Warp", ["x"], ["y"], name="warp7", domain="acme")], domain="acme")
    with pytest.raises(BackendFailed, match=r"Warp \(node 'warp7'\)"):
        BACKEND.build(graph, BuildRequest("fp32"), tmp_path)


def test_every_precision_but_fp32_is_refused_with_a_reason() -> None:
    assert BACKEND.unsupported("fp32", "cpu") is None
    for precision in ("fp16", "bf16", "int8", "int8-dynamic", "mixed"):
        refused = BACKEND.unsupported(precision, "cpu")
        assert refused is not None and refused.why and refused.remedy
    assert BACKEND.unsupported("fp32", "sm75") is not None


def test_a_missing_compiler_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "apt-get install g++" in str(BACKEND.missing())
    assert BACKEND.cannot_run() is None, "a finished library needs no compiler"
    assert "apt-get install g++-aarch64-linux-gnu" in str(BACKEND.unsupported("fp32", "linux-arm64"))
    monkeypatch.setattr(shutil, "which", lambda name: None if name.startswith("qemu") else f"/usr/bin/{name}")
    assert "apt-get install qemu-user-static" in str(apache_tvm_arm.missing())
    assert BACKEND.unsupported("fp32", "linux-arm64") is None


def test_arm_wheels_that_are_not_there_come_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "pip download" in str(apache_tvm_arm.missing())
    wheel = apache_tvm_arm.wheels_folder() / "apache_tvm-0.26.0-py3-none-manylinux_2_28_aarch64.whl"  # type: ignore[operator]
    wheel.write_bytes(b"PK cut short")
    assert apache_tvm_arm.runtime_wheels(wheel.parent) == {}


@needs_tvm
def test_a_library_of_another_machine_is_not_opened(engine: Artifact) -> None:
    with pytest.raises(MissingBackend, match="compiled for linux-arm64"):
        BACKEND.open(replace(engine, device="linux-arm64"), OpenRequest("fp32", 1, 1))
    with pytest.raises(MissingBackend, match="compiled for the CPU 'pentium4'"):
        BACKEND.open(replace(engine, facts={**engine.facts, "cpu": "pentium4"}), OpenRequest("fp32", 1, 1))


@needs_tvm
def test_a_batch_that_was_not_built_is_the_users_error(engine: Artifact) -> None:
    only = replace(engine, facts={**engine.facts, "batches": [1, 8]})
    with pytest.raises(InputError, match=r"built for batch 1, 8, not for 2"):
        BACKEND.open(only, OpenRequest("fp32", 2, 1))


@needs_tvm
def test_random_bytes_are_one_error_with_and_without_the_hash(engine: Artifact, tmp_path: Path) -> None:
    for data in (b"", b"\x7fELF\x02\x01" + bytes(range(256)) * 8, np.random.default_rng(0).bytes(5000)):
        path = tmp_path / "model.so"
        shutil.copy(artifacts.manifest_path(engine.path), artifacts.manifest_path(path))
        path.write_bytes(data)
        with pytest.raises(InputError, match="sha256"):
            artifacts.load(path)
        with pytest.raises(BackendFailed, match="not a whole shared library"):
            BACKEND.open(replace(engine, path=path), OpenRequest("fp32", 1, 1))


@needs_tvm
def test_every_function_of_a_convolutional_net_gets_a_schedule(engine: Artifact) -> None:
    assert engine.facts["unscheduled"] == {}
    assert engine.facts["cpu"] == apache_tvm_compile.here().cpu


@pytest.mark.parametrize(
    ("rows", "columns", "vector_axis"), [(1, 1, 1), (56, 56, 64), (7, 7, 512), (1, 1, 1000), (13, 17, 3), (1, 197, 768)]
)
@pytest.mark.parametrize("registers", [apache_tvm_schedule.Registers(16, 24), apache_tvm_schedule.Registers(4, 12)])
def test_a_tile_divides_its_axes_and_fits_the_registers(
    rows: int, columns: int, vector_axis: int, registers: apache_tvm_schedule.Registers
) -> None:
    r, c, v = apache_tvm_schedule.tile_sizes(rows, columns, vector_axis, registers)
    assert rows % r == columns % c == vector_axis % v == 0
    assert r * c * -(-v // registers.lanes) <= registers.accumulators
    assert r * c * v * 4 <= 1024


def test_a_search_is_refused_where_it_cannot_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apache_tvm_tuning.installed, "missing", lambda module, _: apache_tvm.Missing(module, "pip"))
    assert "pip install xgboost-cpu" in str(apache_tvm_tuning.missing())
    with pytest.raises(MissingBackend, match="xgboost"):
        apache_tvm_tuning.search(None, apache_tvm_compile.arm(), 1, 1.0, tmp_path, tmp_path)


@pytest.mark.slow
@needs_tvm
def test_a_library_a_batch_that_is_tuned_is_compiled_and_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    imported, library = apache_tvm_compile.imported, apache_tvm_compile.library
    written: list[str] = []

    def fixed_only(path: Path, signature: Signature, batch: int | None) -> Any:
        if batch is None:
            raise BackendFailed("the batch went into a shape")
        return imported(path, signature, batch)

    def counted(module: Any, machine: apache_tvm_compile.Machine, threads: int, path: Path) -> Any:
        written.append(path.name)
        return library(module, machine, threads, path)

    monkeypatch.setattr(apache_tvm_compile, "imported", fixed_only)
    monkeypatch.setattr(apache_tvm_compile, "library", counted)
    monkeypatch.setattr(apache_tvm_tuning, "missing", lambda: None)
    # what it costs is not the point here
    monkeypatch.setattr(apache_tvm_tuning, "search", lambda module, *_: ({"curve": [[0.0, 0.0]]}, module))
    monkeypatch.setattr(apache_tvm, "_against_default", lambda *_: {})
    fp32 = _graph(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    options = {"tune": 1.0, "threads": 1}
    made = BACKEND.build(fp32, BuildRequest("fp32", batches=(1, 2), options=options), tmp_path).save()
    assert (made.path.name, list(made.companions)) == ("model-b1.so", ["model-b2.so", "tuning.json"])
    assert written == ["model-b1.so", "model-b2.so"]
    assert BACKEND.open(made, OpenRequest("fp32", 2, 1)).infer({"x": -np.ones((2, 4), np.float32)})["y"].max() == 0


@needs_tvm
def test_a_search_that_cannot_run_is_refused_before_anything_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(apache_tvm, "_libraries", never)
    monkeypatch.setattr(apache_tvm_compile, "no_linker", lambda _: None)
    fp32 = _graph(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    with pytest.raises(InputError, match="the machine that the engine is for"):
        BACKEND.build(fp32, BuildRequest("fp32", apache_tvm_compile.ARM, options={"tune": 1.0}), tmp_path)
    monkeypatch.setattr(apache_tvm_tuning, "missing", lambda: apache_tvm.Missing("no xgboost", "pip"))
    with pytest.raises(MissingBackend, match="no xgboost"):
        BACKEND.build(fp32, BuildRequest("fp32", options={"tune": 1.0}), tmp_path)
    with pytest.raises(AssertionError, match="compiled"):
        BACKEND.build(fp32, BuildRequest("fp32"), tmp_path)


def test_the_search_takes_what_costs_most_and_ends_where_nothing_does() -> None:
    tasks = apache_tvm_tuning.Tasks(["a", "b"], [None, None], [1, 3], [2.0, 1.0], [0, 0])
    assert tasks.next() == 1
    tasks.rounds[1] = 1
    assert tasks.next() == 0
    assert apache_tvm_tuning.Tasks([], [], []).next() is None
    assert apache_tvm_tuning.Tasks(["a", "b"], [None, None], [1, 3], [0.0, 0.0], [0, 0]).next() is None


def test_a_killed_searchs_last_line_is_cut_off(tmp_path: Path) -> None:
    record = tmp_path / "database_tuning_record.json"
    record.write_text('[0, "whole"]\n[1, "unfin')
    assert apache_tvm_tuning.mend(tmp_path) == len('[1, "unfin')
    assert record.read_text() == '[0, "whole"]\n'
    assert apache_tvm_tuning.mend(tmp_path) == 0


@needs_tvm
@pytest.mark.slow
@pytest.mark.skipif(apache_tvm_tuning.missing() is not None, reason=str(apache_tvm_tuning.missing()))
def test_a_tuned_library_gives_the_models_outputs_and_the_next_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fp32 = cases.model("conv_net", tmp_path)
    ended_at = float("inf")
    for turn in ("first", "second"):
        out = tmp_path / turn
        out.mkdir()
        made = BACKEND.build(fp32, BuildRequest("fp32", batches=(2,), options={"tune": 1.0, "threads": 1}), out).save()
        assert set(made.companions) == {"model-b2.so", "tuning.json"}
        log = json.loads((out / "tuning.json").read_text())["model-b2.so"]
        assert log["rounds"] >= 1 or log["seconds"] >= 1.0
        assert log["curve"][0][1] <= ended_at * 1.0001, "the second search starts from what the first one found"
        ended_at = log["curve"][-1][1]
        inputs = cases.feeds(fp32.signature, 2)
        session = BACKEND.open(made, OpenRequest("fp32", 2, 1))
        wanted = cases.expected(BACKEND, "fp32", fp32, tmp_path, inputs)
        assert cases.distance(session.infer(inputs)["logits"], wanted["logits"]) <= 1e-5
        session.close()


@pytest.mark.slow
@needs_tvm
@pytest.mark.skipif(apache_tvm_arm.missing() is not None, reason=str(apache_tvm_arm.missing()))
def test_an_arm_library_runs_under_qemu_with_the_models_outputs(tmp_path: Path) -> None:
    fp32 = cases.model("two_inputs", tmp_path)
    made = BACKEND.build(fp32, BuildRequest("fp32", "linux-arm64", (3,)), tmp_path)
    assert made.path.read_bytes()[18:20] == b"\xb7\x00"  # EM_AARCH64
    assert made.facts["proof"]["max_error"] <= 1e-5
    assert not (tmp_path / "proof").exists()


@needs_tvm
def test_an_arm_build_without_qemu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if BACKEND.unsupported("fp32", "linux-arm64"):
        pytest.skip(str(BACKEND.unsupported("fp32", "linux-arm64")))
    monkeypatch.setattr(apache_tvm_arm, "_EMULATOR", "qemu-that-is-not-here")
    made = BACKEND.build(cases.model("conv_net", tmp_path), BuildRequest("fp32", "linux-arm64"), tmp_path)
    assert "proof" not in made.facts
    assert any("not proven" in note and "apt-get install qemu-user-static" in note for note in made.facts["notes"])


@pytest.mark.slow
@needs_tvm
def test_a_library_runs_over_rpc_on_loopback(engine: Artifact, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tvm.exec.rpc_server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--port-end",
        str(port + 1),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=tmp_path)
    try:
        _answers(port)
        inputs = cases.feeds(engine.signature, 2)
        session = BACKEND.open(engine, OpenRequest("fp32", 2, 1, options={"rpc": f"127.0.0.1:{port}"}))
        here = BACKEND.open(engine, OpenRequest("fp32", 2, 1))
        assert session.device == f"cpu at 127.0.0.1:{port}"
        assert cases.distance(session.infer(inputs)["logits"], here.infer(inputs)["logits"]) <= 1e-6
        session.close()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    with pytest.raises(BackendFailed, match="did not take"):
        BACKEND.open(engine, OpenRequest("fp32", 2, 1, options={"rpc": f"127.0.0.1:{port}"}))
    with pytest.raises(InputError, match="HOST:PORT"):
        BACKEND.open(engine, OpenRequest("fp32", 2, 1, options={"rpc": "board"}))


def _answers(port: int) -> None:
    """Waits until something listens there."""
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    pytest.fail("TVM's RPC server did not start")
