"""Which preprocessing is used: the one asked for, else what the manifest keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models

from deploykit import preprocess
from deploykit.errors import InputError
from deploykit.preprocess import IMAGENET, NONE


def test_what_is_asked_for_stands_over_the_manifest() -> None:
    assert preprocess.chosen("none", IMAGENET.to_json()) == NONE
    assert preprocess.chosen(None, IMAGENET.to_json()) == IMAGENET
    assert preprocess.chosen("timm", IMAGENET.to_json()) == IMAGENET
    assert preprocess.chosen(None, None) is None


def test_a_manifests_own_that_is_not_there_is_no_silent_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names no preprocessing"):
        preprocess.chosen("timm", None)
    from deploykit.pipeline import comparing
    from deploykit.pipeline.request import DataRequest, Silent

    path = tiny_models.conv_net(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="names no preprocessing"):
        comparing.compare(path, path, DataRequest("random:2", preprocess="timm"), {}, Silent())
