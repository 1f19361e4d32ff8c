"""Why INT8 isn't faster: a runtime's profile read against the graph it was given."""

from __future__ import annotations

from deploykit.stages.bottleneck.api import BACKENDS, Explanation, explain
from deploykit.stages.bottleneck.causes import Finding

__all__ = ["BACKENDS", "Explanation", "Finding", "explain"]
