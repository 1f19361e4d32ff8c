"""The libraries of edge.py driven by hand, as their own documentation does it, with nothing of deploykit.

python benchmarks/edge_by_hand.py build executorch|litert FILE
python benchmarks/edge_by_hand.py time executorch|litert FILE THREADS SECONDS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

SHAPE = (1, 3, 224, 224)


def resnet18() -> torch.nn.Module:
    """ResNet-18 with random weights."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).eval()


def build_executorch(file: Path) -> None:
    """Export, PT2E with XNNPACKQuantizer for each channel, XNNPACK: docs.pytorch.org/executorch, 'XNNPACK backend'."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example = (torch.randn(*SHAPE),)
    traced = torch.export.export(resnet18(), example).module()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(traced, quantizer)
    with torch.no_grad():
        for _ in range(4):
            prepared(torch.randn(*SHAPE))
    exported = torch.export.export(convert_pt2e(prepared), example)
    file.write_bytes(to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


def run_executorch(file: Path, threads: int) -> Callable[[torch.Tensor], Any]:
    """One run on executorch.runtime."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(file).load_method("forward")
    assert method is not None
    return lambda image: method.execute([image])


def build_litert(file: Path) -> None:
    """litert-torch, then ai-edge-quantizer's static recipe and its own calibration, float inputs and outputs."""
    import litert_torch
    from ai_edge_quantizer import qtyping, quantizer, recipe

    litert_torch.convert(resnet18(), (torch.randn(*SHAPE),)).export(str(file.with_suffix(".float.tflite")))
    making = quantizer.Quantizer(str(file.with_suffix(".float.tflite")), recipe.static_wi8_ai8())
    for port in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        making.update_quantization_recipe(".*", port, algorithm_key="no_quantize")
    ranges = making.calibrate({"serving_default": [{"args_0": np.random.randn(*SHAPE).astype(np.float32)} for _ in range(4)]})
    file.write_bytes(making.quantize(ranges).quantized_model)


def run_litert(file: Path, threads: int) -> Callable[[torch.Tensor], Any]:
    """One run on LiteRT's interpreter, which takes XNNPACK by itself."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(file), num_threads=threads)
    interpreter.allocate_tensors()
    index = interpreter.get_input_details()[0]["index"]

    def run(image: torch.Tensor) -> Any:
        interpreter.set_tensor(index, image.numpy())
        return interpreter.invoke()

    return run


BUILD = {"executorch": build_executorch, "litert": build_litert}
RUN = {"executorch": run_executorch, "litert": run_litert}


def timed(run: Callable[[Any], Any], seconds: float) -> dict[str, float]:
    """Median seconds over a window, after as long a warm-up as deploykit takes at most."""
    images = [torch.randn(*SHAPE) for _ in range(4)]
    times: list[float] = []
    for length in (1.0, seconds):
        times.clear()
        end = time.perf_counter() + length
        while time.perf_counter() < end:
            start = time.perf_counter()
            run(images[len(times) % 4])
            times.append(time.perf_counter() - start)
    return {"p50_s": float(np.median(times)), "n": len(times)}


def main() -> None:
    """Builds or times."""
    what, library, file, *rest = sys.argv[1:]
    if what == "build":
        BUILD[library](Path(file))
    else:
        print(json.dumps(timed(RUN[library](Path(file), int(rest[0])), float(rest[1]))))


if __name__ == "__main__":
    main()
