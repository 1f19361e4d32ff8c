"""What `run` and `bench` are told alike, declared once: each field is an option of both."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.cli import options as o
from deploykit.cli import parsing

if TYPE_CHECKING:
    from deploykit.pipeline.line import LineRequest
    from deploykit.pipeline.request import SourceRequest


@dataclass(frozen=True)
class LineOptions:
    """The options in the order in which `--help` lists them."""

    data: o.Data = None
    calib_data: o.CalibData = None
    weights: o.Weights = None
    num_classes: o.NumClasses = None
    inputs: o.Inputs = None
    backend: o.BackendNames = None
    precision: o.PrecisionNames = None
    batch: o.Batch = "1,8"
    target: o.TargetNames = None
    threads: o.Threads = None
    duration: o.DurationName = "quick"
    preprocess: o.Preprocess = None
    classes: o.Classes = None
    limit: o.Limit = None
    calib: o.CalibFile = None
    calib_n: o.CalibN = 512
    method: o.Method = o.DEFAULT_METHOD
    min_sqnr: o.MinSqnr = None
    min_agreement: o.MinAgreement = None
    bias_correct: o.BiasCorrect = None
    scale_correct: o.ScaleCorrect = None
    weight_scales: o.WeightScales = "max"
    reduce_range: o.ReduceRange = False
    rounding: o.Rounding = "nearest"
    shapes: o.Shapes = None
    store: o.StoreFolder = Path("engines")
    aa: o.AA = False
    streams: o.Streams = 1
    layout: o.Layout = "channels-first"
    scenario: o.Scenario = None
    server_latency: o.ServerLatency = "15ms"

    def request(
        self,
        targets: Sequence[SourceRequest],
        *,
        max_drop: str | None = None,
        recalibrate: bool = False,
        remeasure: bool = False,
    ) -> LineRequest:
        """The request they stand for; `max_drop` is part of a mixed row's budget. Raises InputError for values that make no sense."""
        from deploykit.pipeline.line import LineRequest
        from deploykit.pipeline.request import DataRequest, RowsRequest

        parsing.positive(self.limit, "--limit")
        parsing.positive(self.calib_n, "--calib-n")
        parsing.positive(self.threads, "--threads")
        precisions = parsing.names(self.precision)
        load = parsing.load(self.streams, self.layout, self.scenario, self.server_latency)
        data = DataRequest(
            data=self.data,
            calib_data=self.calib_data,
            preprocess=self.preprocess,
            classes=self.classes,
            limit=self.limit,
            calib_n=self.calib_n,
            method=self.method,
            calib_table=self.calib,
            recalibrate=recalibrate,
            int8=parsing.int8(self.bias_correct, self.scale_correct, self.weight_scales, self.reduce_range, self.rounding),
            budget=parsing.budget(max_drop if "mixed" in (precisions or ()) else None, self.min_sqnr, self.min_agreement),
        )
        rows = RowsRequest(
            backends=parsing.names(self.backend),
            precisions=precisions,
            batches=parsing.batches(self.batch),
            targets=parsing.names(self.target),
            threads=self.threads,
            duration=self.duration,
            shapes=parsing.shapes(self.shapes),
            aa=self.aa,
            remeasure=remeasure,
            streams=load.streams,
            layout=load.layout,
            scenario=load.scenario,
            server_latency_s=load.server_latency_s,
        )
        return LineRequest(tuple(targets), data, rows, self.store, command=("deploykit", *sys.argv[1:]))
