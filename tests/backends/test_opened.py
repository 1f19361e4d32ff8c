"""What every session checks before it touches its engine."""

from __future__ import annotations

import numpy as np

from deploykit.backends import opened
from deploykit.session import OpenRequest
from deploykit.signature import Signature, TensorSpec


def test_a_scalar_input_stays_a_scalar() -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", 2)), TensorSpec("k", "float32", ())), ())
    feeds = {"x": np.asfortranarray(np.zeros((3, 2), np.float32)), "k": np.array(2, np.float32)}
    ready = opened.ready(signature, OpenRequest("fp32", 3, 1), feeds)
    assert ready["k"].shape == ()  # OpenVINO takes no [1] for it
    assert ready["x"].flags.c_contiguous
