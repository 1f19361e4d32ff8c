"""Graph checks: what is wrong with an ONNX file, what a target will make of it, and what it costs to run."""

from __future__ import annotations

from deploykit.stages.checks.api import RULED, TARGETS, find, lint
from deploykit.stages.checks.repair import repair
from deploykit.stages.checks.summary import GraphSummary, summary

__all__ = ["RULED", "TARGETS", "GraphSummary", "find", "lint", "repair", "summary"]
