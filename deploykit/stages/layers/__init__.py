"""Where it was lost: two graphs over the same samples, layer by layer."""

from __future__ import annotations

from deploykit.stages.layers.api import ALONE, LayerDrift, LayerReport, find

__all__ = ["ALONE", "LayerDrift", "LayerReport", "find"]
