"""What a sweep costs and how good its recommendation is, against measuring every configuration as `bench` does.

    python benchmarks/sweep.py [--size 64] [--batch 1,2,4,8,16,32] [--json FILE]

ResNet-18 with random weights at SIZE x SIZE on ONNX Runtime and OpenVINO in FP32 and INT8, one and two requests at once. First
`deploykit sweep` as a user runs it, engines built beforehand for both; then each configuration of its space in three
launches of a second (quick). Both choose by throughput. Since an exhaustive search on a busy machine is off by the machine's
own noise, the two choices and the exhaustive runner-up are then measured in turns, in five launches, and the recommendation is
compared with the best of those. Goals: within 3 % of the best, in at most a quarter of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploykit import machine
from deploykit.configuration import Configuration, Limits
from deploykit.measurement import Measurement
from deploykit.pipeline import line, sweeping
from deploykit.pipeline.line import LineRequest
from deploykit.pipeline.request import DataRequest, RowsRequest, Silent, SourceRequest
from deploykit.session import OpenRequest
from deploykit.signature import TensorSpec
from deploykit.stages import bench

REFEREE = bench.Duration("referee", launches=5, rounds=6, seconds=10.0, limit_s=10.0, enough_runs=64)


class Spoken(Silent):
    """Says each step with the time."""

    def step(self, text: str) -> None:
        """Prints the step."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)


def main() -> int:
    """Runs the comparison; 0 when both goals are met, 1 when one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", default="1,2,4,8,16,32")
    parser.add_argument("--precision", default="fp32,int8")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "sweep.json")
    options = parser.parse_args()
    say = Spoken()
    with tempfile.TemporaryDirectory() as name:
        spec = TensorSpec("x", "float32", ("batch", 3, options.size, options.size))
        rows = RowsRequest(
            ("onnxruntime", "openvino"), tuple(options.precision.split(",")), tuple(int(b) for b in options.batch.split(","))
        )
        source = SourceRequest("resnet18", "none", 10, (spec,))
        asked = LineRequest((source,), DataRequest("random:128"), rows, Path(name) / "store")
        made = line.ready(asked, say)  # the engines: both sides find them built
        request = sweeping.SweepRequest(asked, Limits())
        start = time.perf_counter()
        swept = sweeping.take(request, say)
        sweep_s = time.perf_counter() - start
        space = [t.configuration for t in swept.found.trials]
        engines = {(e.row.backend, e.row.precision): e.engine for e in made.entries}
        pools, _ = line.pools_for(made.models[0].signature, made.samples.judge, {c.batch for c in space}, made.rows)

        def target(c: Configuration) -> bench.Target:
            opening = OpenRequest(c.precision, c.batch, c.threads, options={"streams": c.streams} if c.streams > 1 else {})
            return bench.Target(str(c), c.backend, engines[c.engine].path, opening, group=f"batch {c.batch}")

        start = time.perf_counter()
        found = bench.measure([target(c) for c in space], pools, bench.duration("quick"))
        exhaustive_s = time.perf_counter() - start
        rates = {c: m.images_per_s for c in space if isinstance(m := found[str(c)], Measurement)}
        ranked = sorted(rates, key=lambda c: -rates[c])
        assert swept.found.best is not None
        finalists = list(dict.fromkeys([swept.found.best, *ranked[:2]]))
        # one group: whatever their batches, they are measured in turns
        referees = [replace(target(c), group="referee") for c in finalists]
        judged = bench.measure(referees, pools, REFEREE)
    final = {c: m.images_per_s for c in finalists if isinstance(m := judged[str(c)], Measurement)}
    best = max(final, key=lambda c: final[c])
    reached = final[swept.found.best] / final[best]
    doc: dict[str, Any] = {
        "benchmark": "sweep",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "load_average": os.getloadavg()[0],
        "size": options.size,
        "configurations": len(space),
        "measured_by_the_sweep": sum(bool(t.scores) for t in swept.found.trials),
        "sweep_s": sweep_s,
        "exhaustive_s": exhaustive_s,
        "time_share": sweep_s / exhaustive_s,
        "recommended": str(swept.found.best),
        "exhaustive_best": str(ranked[0]),
        "referee": {str(c): rate for c, rate in final.items()},
        "reached": reached,
        "goals": {"reached": 0.97, "time_share": 0.25},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(doc, indent=1) + "\n")
    print(
        f"{doc['recommended']}: {reached:.1%} of the best ({best}), in {sweep_s:.0f} s against {exhaustive_s:.0f} s "
        f"({doc['time_share']:.0%}) for {len(space)} configurations"
    )
    return 0 if reached >= 0.97 and sweep_s <= 0.25 * exhaustive_s else 1


if __name__ == "__main__":
    sys.exit(main())
