"""Damaged .keras files: a ModelError with the file's name before Keras is asked, never a traceback."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from deploykit.errors import ModelError
from deploykit.stages import source_keras


@pytest.mark.parametrize("levels", [2_000, 200_000])
def test_a_description_nested_too_deep_is_refused(tmp_path: Path, levels: int) -> None:
    file = tmp_path / "deep.keras"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("config.json", '{"config":' * levels + "{}" + "}" * levels)
    with pytest.raises(ModelError, match="nested too deep"):
        source_keras._refuse_code(file)
