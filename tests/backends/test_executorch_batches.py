"""The batches of an ExecuTorch program of a .pt2: those asked for, within what the file was traced for."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit.backends import executorch_build
from deploykit.session import BuildRequest
from deploykit.signature import Signature, TensorSpec

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("most", "wanted"), [(None, (1, 8)), (4, (1, 4))])
def test_a_batch_without_an_upper_end_takes_what_is_asked_for(most: int | None, wanted: tuple[int, int], tmp_path: Path) -> None:
    class Double(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: object) -> object:
            return x * 2  # type: ignore[operator]

    batch = torch.export.Dim("batch") if most is None else torch.export.Dim("batch", max=most)
    made = torch.export.export(Double(), (torch.zeros(2, 3),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(made, tmp_path / "m.pt2")
    traced = torch.export.load(tmp_path / "m.pt2")
    spec = TensorSpec("x", "float32", ("N", 3))
    signature = Signature((spec,), (TensorSpec("y", "float32", ("N", 3)),))
    low, high = executorch_build._batches(signature, BuildRequest("fp32", batches=(1, 8)), traced)
    assert (low, high) == wanted
