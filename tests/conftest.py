"""Shared by all tests: tests/ is importable (tiny_models), and no test reaches for a hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
