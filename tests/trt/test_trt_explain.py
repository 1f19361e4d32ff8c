from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from trt_graphs import artifact, attempt_unguarded, qdq_conv

from deploykit import children
from deploykit.errors import BackendFailed, ChildDied, MissingBackend
from deploykit.pipeline.explaining import explained
from deploykit.session import BuildRequest
from deploykit.trt import explain

TESTS = str(Path(__file__).parents[1])


def _chain(path: Path, length: int, branches: list[int]) -> Path:
    """x -> Relu/Abs/Add nodes; node i adds the output of an earlier one where `branches[i]` says so."""
    nodes, names = [], ["x"]
    for i in range(length):
        other = branches[i % len(branches)] if branches else 0
        if other and i > 0:
            nodes.append(helper.make_node("Add", [names[-1], names[-1 - other % len(names)]], [f"t{i}"], name=f"n{i}"))
        else:
            nodes.append(helper.make_node("Relu" if i % 2 else "Abs", [names[-1]], [f"t{i}"], name=f"n{i}"))
        names.append(f"t{i}")
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.zeros(1, np.float32), "unused")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def _fails_with(culprits: set[str]) -> explain.Failure | object:
    def attempt(path: Path) -> explain.Failure | None:
        model = onnx.load(str(path))
        onnx.checker.check_model(model, full_check=True)
        found = {node.name for node in model.graph.node}
        return explain.Failure("refusal", f"refused with {len(found)} nodes") if culprits <= found else None

    return attempt


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), length=st.integers(2, 24), branches=st.lists(st.integers(0, 5), max_size=5))
def test_what_is_found_still_fails_and_holds_nothing_else(
    tmp_path: Path, data: st.DataObject, length: int, branches: list[int]
) -> None:
    path = _chain(tmp_path / "m.onnx", length, branches)
    culprits = {f"n{i}" for i in data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=3))}
    found = explain.smallest_failing(path, _fails_with(culprits), tmp_path / "part.onnx", limit=1000)  # type: ignore[arg-type]
    assert found is not None
    assert found.complete
    assert {name for name, _ in found.nodes} == culprits
    assert {node.name for node in onnx.load(str(found.path)).graph.node} == culprits
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "part.onnx"]


def test_a_model_that_builds_has_nothing_to_explain(tmp_path: Path) -> None:
    assert explain.smallest_failing(_chain(tmp_path / "m.onnx", 4, []), lambda _: None, tmp_path / "part.onnx") is None
    assert not (tmp_path / "part.onnx").exists()


def test_a_model_of_unknown_shapes_is_looked_at_too(tmp_path: Path) -> None:
    """Its output has an axis that nothing tells of: the whole is tried as it is."""
    model = onnx.load(str(_chain(tmp_path / "m.onnx", 4, [])))
    model.graph.node.insert(0, helper.make_node("Relu", ["x"], ["n"], name="nothing"))
    custom = helper.make_node("Mystery", [model.graph.node[-1].output[0]], ["y"], name="strange", domain="nobody")
    model.graph.node.append(custom)
    model.opset_import.append(helper.make_opsetid("nobody", 1))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4]))
    onnx.save(model, str(tmp_path / "m.onnx"))

    def attempt(path: Path) -> explain.Failure | None:
        names = {node.name for node in onnx.load(str(path)).graph.node}
        return explain.Failure("refusal", "no such operator") if "strange" in names else None

    found = explain.smallest_failing(tmp_path / "m.onnx", attempt, tmp_path / "part.onnx")
    assert found is not None
    assert "strange" in {name for name, _ in found.nodes}


def test_what_attempts_write_lies_in_their_own_folder(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    seen: list[Path] = []

    def attempt(path: Path) -> explain.Failure:
        seen.append(path.parent)
        return explain.Failure("refusal", "no")

    explain.smallest_failing(_chain(tmp_path / "m.onnx", 3, []), attempt, tmp_path / "part.onnx", scratch=tmp_path / "scratch")
    assert set(seen) == {tmp_path / "scratch"}
    assert list((tmp_path / "scratch").iterdir()) == []


def test_at_the_limit_what_was_found_so_far_is_told(tmp_path: Path) -> None:
    path = _chain(tmp_path / "m.onnx", 16, [])
    found = explain.smallest_failing(path, _fails_with({"n7"}), tmp_path / "part.onnx", limit=4)  # type: ignore[arg-type]
    assert found is not None
    assert not found.complete
    assert found.builds == 4
    assert "so far" in str(found)
    assert "n7" in {name for name, _ in found.nodes}


def test_another_failure_is_not_taken_for_the_same(tmp_path: Path) -> None:
    def attempt(path: Path) -> explain.Failure:
        names = {node.name for node in onnx.load(str(path)).graph.node}
        return explain.Failure("refusal", "the zero point of 'a' is 3" if "n2" in names else "no layers")

    found = explain.smallest_failing(_chain(tmp_path / "m.onnx", 6, []), attempt, tmp_path / "part.onnx")
    assert found is not None
    assert [name for name, _ in found.nodes] == ["n2"]
    assert found.failure.message.startswith("the zero point")


def test_failures_are_alike_but_for_names_and_numbers() -> None:
    one, two = explain.Failure("refusal", "node 'a' (Conv): size 3"), explain.Failure("refusal", "node 'b' (Conv): size 12")
    assert one.likeness == two.likeness
    assert one.likeness != explain.Failure("refusal", "node 'a' (Gemm): size 3").likeness
    crash = explain.Failure("crash", "attempt: its process was killed by SIGSEGV in x; last output: 7")
    assert crash.likeness == explain.Failure("crash", "build: its process was killed by SIGSEGV in y").likeness
    assert crash.likeness != explain.Failure("crash", "build: its process was killed by SIGKILL in y").likeness


def test_outcomes_of_a_build() -> None:
    def raises(exc: Exception) -> explain.Failure | None:
        def build() -> None:
            raise exc

        return explain.outcome(build)

    assert explain.outcome(lambda: None) is None
    assert raises(ChildDied("killed by SIGSEGV")) == explain.Failure("crash", "killed by SIGSEGV")
    assert raises(BackendFailed("no")) == explain.Failure("refusal", "no")
    with pytest.raises(MissingBackend):
        raises(MissingBackend("not here"))
    with pytest.raises(KeyError):
        raises(KeyError("a bug"))


@pytest.mark.slow
def test_a_real_crash_of_the_builder_is_cut_down_to_its_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("PYTHONPATH", TESTS)
    path = qdq_conv(tmp_path / "m.onnx", computed_scale=True)

    def attempt(part: Path) -> explain.Failure | None:
        return explain.outcome(lambda: children.run("attempt", attempt_unguarded, part, timeout_s=120.0))

    found = explain.smallest_failing(path, attempt, tmp_path / "part.onnx")
    assert found is not None
    assert found.failure.kind == "crash"
    assert "SIGSEGV" in found.failure.message
    assert {op for _, op in found.nodes} <= {"QuantizeLinear", "DequantizeLinear", "Conv"}
    assert len(found.nodes) <= 4


@pytest.mark.slow
def test_explain_names_the_operator_after_a_failed_build(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = qdq_conv(tmp_path / "m.onnx", activation="Det")
    out = tmp_path / "found" / "part.onnx"
    request = BuildRequest("int8", "sm89", (1, 2))
    told = explained(BackendFailed("no"), "tensorrt-rtx", artifact(path, "int8"), request, out)
    assert "1 node(s): Det 'act'" in told.message
    assert [node.name for node in onnx.load(str(out)).graph.node] == ["act"]
    fine = explained(BackendFailed("no"), "tensorrt-rtx", artifact(qdq_conv(path), "int8"), request, tmp_path / "none.onnx")
    assert "did not fail" in fine.message
    assert not (tmp_path / "none.onnx").exists()
