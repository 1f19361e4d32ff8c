"""What torch.export's exceptions say: the line of the model that it stopped at, and whether that line asks for a tensor's values."""

from __future__ import annotations

import re


def place(exc: BaseException) -> str:
    """' at FILE:LINE in FUNCTION: CODE', the innermost frame of the model that the exception's text shows; '' where it shows none."""
    text = str(exc)
    frame = re.search(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.+)', text.rpartition("The following call raised")[2] or text)
    return f" at {frame[1]}:{frame[2]} in {frame[3]}: {frame[4].strip()}" if frame else ""


def asks_for_values(exc: BaseException) -> bool:
    """Whether tracing stopped because the model branches on the values of a tensor, which no graph holds."""
    return "data-dependent" in str(exc) or "DataDependent" in type(exc).__name__
