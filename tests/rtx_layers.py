"""Builds an .onnx for a target with TensorRT-RTX (no GPU needed) and prints, as JSON, kind and input type of each layer.

Run as a process of its own: `python rtx_layers.py MODEL.onnx SM80`. The listing is what the builder logs at VERBOSE.
"""

from __future__ import annotations

import json
import re
import sys

import tensorrt_rtx as trt


class Logger(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        self.lines.append(message)
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


def main(path: str, target: str) -> None:
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path) or not network.num_layers:
        sys.exit(f"not parsed: {[parser.get_error(i).desc() for i in range(parser.num_errors)][:1]}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        profile.set_shape(tensor.name, *[tuple(n if d == -1 else d for d in tensor.shape) for n in (1, 2, 4)])
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        sys.exit(f"not built: {logger.errors[:1]}")
    listing = " ".join(line for line in logger.lines if "LayerType" in line).replace("\n", " ")
    layers = []
    for layer in re.split(r"(?=Name: [^,]*, LayerType)", listing):
        kind = re.search(r"LayerType: (\w+)", layer)
        source = re.search(r"Inputs: .*?Datatype: (\w+)", layer)
        if kind:
            layers.append((kind.group(1), source.group(1) if source else None))
    print(json.dumps(layers))


if __name__ == "__main__":
    main(*sys.argv[1:])
