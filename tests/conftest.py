"""Shared by all tests: tests/ is importable (tiny_models), and no test reaches for a hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's commands first: they take minutes in one test, and another process works through the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
