"""The builder's own small rules, over objects that answer as TensorRT's do where no GPU is needed to know how."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from tiny_models import conv_net

from deploykit.errors import InputError
from deploykit.trt import builder


class _Config:
    """A builder's configuration: `made` is what its cache method gives, `accepts` what setting it answers."""

    def __init__(self, made: object | None, *, accepts: bool) -> None:
        self._made, self._accepts = made, accepts

    def create_timing_cache(self, _: bytes) -> object | None:
        return self._made

    def set_timing_cache(self, _: object, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return self._accepts


def test_a_timing_cache_of_another_gpu_is_named() -> None:
    cache = object()
    assert builder._timing_cache(_Config(cache, accepts=True), b"") is cache
    assert builder._timing_cache(_Config(cache, accepts=True), None) is None
    for config in (_Config(None, accepts=True), _Config(cache, accepts=False)):
        with pytest.raises(InputError, match="of another GPU"):
            builder._timing_cache(config, b"timings")


def test_a_parser_that_gives_a_number_only_has_its_node_named(tmp_path: Path) -> None:
    """TensorRT 8.6's ParserError has neither the node's name nor its operator."""
    model = onnx.load(str(conv_net(tmp_path / "m.onnx")))
    first = model.graph.node[0]
    assert builder._culprit(SimpleNamespace(node=lambda: 0), model) == (first.op_type, first.name)
    assert builder._culprit(SimpleNamespace(node=lambda: -1), model) == ("", "")
    newer = SimpleNamespace(node=lambda: 0, node_operator=lambda: "Det", node_name=lambda: "d")
    assert builder._culprit(newer, model) == ("Det", "d")
