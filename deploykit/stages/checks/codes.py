"""The codes of the graph checks: one rule a code, with its severity and remedy, and the folding of hits into findings.

`docs/findings.md` lists the same table; a test holds the two together. A code keeps its meaning and its severity.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deploykit.verdict import SEVERITIES, Finding

ANY = "any"
# A defect of the model that engines load all the same (NaN weights, a batch axis that isn't free): an error for
# `deploykit check`, but no reason to stop the line, which stops only for a file that no engine could load.
MODEL = "model"
SHOWN = 3


@dataclass(frozen=True)
class Rule:
    """What one code means. `remedy` may be replaced by a hit that knows better."""

    code: str
    severity: str
    title: str
    remedy: str


@dataclass(frozen=True)
class Hit:
    """One place where a rule applies. `detail` says what was found there; `node` is a node's or a tensor's name."""

    code: str
    node: str = ""
    detail: str = ""
    target: str = ANY
    remedy: str = ""


def _table(*rows: tuple[str, str, str, str]) -> dict[str, Rule]:
    return {row[0]: Rule(*row) for row in rows}


RULES = _table(
    # --- the file
    ("DK001", "error", "not a valid ONNX model, and no engine that was asked loads it", "export the model again"),
    (
        "DK002",
        "warning",
        "onnx.checker refuses it, though an engine here loads it",
        "export it again with a current exporter; other engines may refuse it",
    ),
    (
        "DK003",
        "warning",
        "strict shape inference fails",
        "correct the shapes at that node, or export again; engines that need shapes will refuse it",
    ),
    (
        "DK004",
        "info",
        "nodes without a name, or with a name used twice",
        "name the nodes: findings, profiles and mixed precision speak of nodes by name",
    ),
    (
        "DK005",
        "info",
        "control flow",
        "TensorRT and quantizers leave such bodies as they are; trace the branch away if it is constant",
    ),
    ("DK006", "info", "weights in external data files", "move the data files together with the .onnx"),
    ("DK007", "info", "a very large model", "above 2 GiB weights must be external data; expect long builds and high peak memory"),
    ("DK008", "info", "nodes whose result nothing reads", "remove them; engines usually do"),
    # --- the batch and other axes
    ("DK010", "warning", "the batch is fixed", "export with a dynamic batch axis to run at other batches"),
    (
        "DK011",
        "error",
        "the batch axis is declared dynamic, but the graph bakes it",
        "derive the batch from the input's own shape",
    ),
    (
        "DK012",
        "warning",
        "a sample's result depends on the other samples of its batch",
        "look for normalization or reductions over the batch axis; put the model in evaluation mode before the export; or that axis is no batch",
    ),
    (
        "DK013",
        "warning",
        "an output whose shape does not grow with the batch",
        "keep the batch axis in every output, so that results can be told apart by sample",
    ),
    (
        "DK014",
        "warning",
        "an output is declared with a fixed batch though the input's is dynamic",
        "declare the output's batch axis with the input's symbol",
    ),
    (
        "DK015",
        "warning",
        "the dynamic batch could not be proven by running it",
        "see the reason; give --shapes for axes whose size is not known",
    ),
    (
        "DK016",
        "info",
        "dynamic axes beside the batch",
        "give their range with --shapes NAME=min:opt:max, or data whose shapes serve",
    ),
    (
        "DK017",
        "info",
        "two runs on the same input differ",
        "export in evaluation mode (no dropout, no random noise), or accuracy cannot be compared",
    ),
    # --- inputs and outputs
    (
        "DK020",
        "warning",
        "float64 tensors",
        "export in float32: float64 is several times slower, and accelerators convert or refuse it",
    ),
    (
        "DK021",
        "info",
        "float16 or bfloat16 inputs or outputs",
        "feed that type; keep float32 at the boundary if callers have float32 data",
    ),
    ("DK022", "warning", "string tensors", "do the text processing outside of the model: only ONNX Runtime runs it"),
    ("DK023", "info", "int64 inputs or outputs", "engines without int64 convert to int32; values must fit"),
    # --- the weights
    ("DK030", "error", "NaN in the weights", "the checkpoint is broken or training diverged: take another one"),
    ("DK031", "error", "Inf in the weights", "the checkpoint is broken or training diverged: take another one"),
    ("DK032", "warning", "denormal weights", "set them to zero: CPUs compute with denormals many times slower"),
    (
        "DK033",
        "warning",
        "dead output channels (all weights zero)",
        "prune them; for INT8 give them a positive scale (`check --repair` does)",
    ),
    ("DK034", "warning", "unused initializers", "remove them (`check --repair` does)"),
    ("DK035", "info", "duplicate initializers", "share one tensor (`check --repair` does)"),
    (
        "DK036",
        "warning",
        "NaN or Inf in the outputs on ordinary random inputs",
        "look for a division by zero or an overflow upstream of that output",
    ),
    # --- the range of FP16
    ("DK040", "warning", "weights too large for FP16 (above 65504)", "keep that layer in FP32 (mixed precision), or rescale it"),
    ("DK041", "info", "weights that vanish in FP16 (under 6e-8)", "harmless where few; keep the layer in FP32 where many"),
    ("DK042", "warning", "constants too large for FP16", "write a mask as -6e4 instead of -1e9, or keep the node in FP32"),
    (
        "DK043",
        "warning",
        "an epsilon or constant that vanishes in FP16",
        "use an epsilon of 1e-5 or more, or keep the node in FP32",
    ),
    # --- what is already quantized
    ("DK050", "info", "already quantized with Q/DQ nodes", "it runs as int8 as it is; quantizing again is refused"),
    (
        "DK051",
        "info",
        "already quantized in operator form (QLinear...)",
        "ONNX Runtime's own form; use the Q/DQ form for other engines",
    ),
    (
        "DK052",
        "info",
        "already quantized dynamically",
        "suited to MatMul on CPUs; use static Q/DQ for convolutions and accelerators",
    ),
    # --- operators and opset against the targets
    ("DK060", "error", "ONNX Runtime refuses the model", "see the operator or node that it names"),
    ("DK061", "error", "OpenVINO refuses the model", "see the operator or node that it names"),
    ("DK062", "error", "TensorRT-RTX's parser refuses the model", "see the operator or node that it names"),
    (
        "DK063",
        "warning",
        "TensorRT-RTX's parser, of the same family, refuses the model",
        "expect TensorRT to refuse it too; change the node it names",
    ),
    (
        "DK064",
        "warning",
        "operators outside of ONNX's own domains",
        "only an engine that registers that domain runs them; export with standard operators",
    ),
    (
        "DK065",
        "warning",
        "the target's own loader could not be asked here",
        "install the package to have operators and opset checked by the engine itself",
    ),
    ("DK066", "info", "an old opset", "convert to opset 13 or later: per-channel Q/DQ needs it"),
    (
        "DK067",
        "warning",
        "an opset newer than the installed onnx knows",
        "export with an opset that engines have (18 to 21 is safe), or upgrade onnx and the engines",
    ),
    (
        "DK068",
        "info",
        "no rules are known for that target",
        "its build is the check: deploykit build MODEL --backend TARGET -o DIR",
    ),
    # --- TensorRT's rules for Q/DQ
    (
        "DK101",
        "error",
        "int32 DequantizeLinear on a bias",
        "keep the bias in float: quantize with QuantizeBias=False (`check --repair` does it)",
    ),
    (
        "DK102",
        "error",
        "a zero point other than 0",
        "quantize symmetrically to int8 (`check --repair` turns uint8 with zero point 128 into it)",
    ),
    ("DK103", "error", "uint8 with zero point 0", "TensorRT takes it as int8 and loses half of the range: quantize to int8"),
    ("DK104", "error", "16-bit Q/DQ", "TensorRT has no 16-bit integers: quantize to int8, or leave that tensor in float"),
    (
        "DK105",
        "error",
        "a scale that is zero, negative or not finite",
        "give a dead channel a small positive scale (`check --repair` does where its weights are zero)",
    ),
    ("DK106", "error", "an operator in quantized form (QLinear..., ...Integer)", "quantize into Q/DQ form"),
    ("DK107", "error", "DynamicQuantizeLinear", "use static Q/DQ: TensorRT needs its scales before it runs"),
    (
        "DK108",
        "error",
        "a scale or zero point that is computed, not constant",
        "store it as an initializer: the parser crashes on a computed one",
    ),
    (
        "DK109",
        "warning",
        "per-channel Q/DQ on an activation: the layer silently stays float",
        "one scale for an activation; per-channel scales for weights only",
    ),
    (
        "DK110",
        "warning",
        "weights quantized along another axis than the output channel: the layer silently stays float",
        "axis 0 for Conv and Gemm with transB, axis 1 for ConvTranspose, the last axis for MatMul",
    ),
    (
        "DK111",
        "warning",
        "only one of activation and weight is quantized: the layer silently stays float",
        "quantize both, or neither",
    ),
    (
        "DK112",
        "warning",
        "scales under 6.1e-5 lose precision in FP16",
        "keep these scales in FP32, or leave that tensor in float",
    ),
    (
        "DK113",
        "warning",
        "Q/DQ between a layer and its activation function keeps them from being fused",
        "quantize after the activation function only",
    ),
    ("DK114", "error", "uint8 weights", "quantize weights symmetrically to int8"),
    (
        "DK115",
        "warning",
        "a quantized ConvTranspose: TensorRT-RTX runs it in float",
        "leave ConvTranspose in float: its Q/DQ costs accuracy and gains no speed there",
    ),
    (
        "DK116",
        "warning",
        "a Cast between DequantizeLinear and the layer: the layer silently stays float",
        "dequantize to the layer's own type: give DequantizeLinear its scale in that type, and leave the Cast out",
    ),
)


def fold(hits: Iterable[Hit]) -> list[Finding]:
    """One finding for each code and target: the count, the first three places, and the remedy; errors first."""
    groups: dict[tuple[str, str], list[Hit]] = {}
    for hit in hits:
        groups.setdefault((hit.code, hit.target), []).append(hit)
    findings = []
    for (code, target), group in groups.items():
        rule = RULES[code]
        unique = list(dict.fromkeys(group))
        places = [_place(h) for h in unique if h.node or h.detail]
        message = rule.title + (f" ({len(unique)} places)" if len(unique) > 1 else "")
        if places:
            rest = len(places) - SHOWN
            message += ": " + "; ".join(places[:SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
        remedies = list(dict.fromkeys(h.remedy for h in unique if h.remedy))
        node = ", ".join(h.node for h in unique[:SHOWN] if h.node)
        findings.append(Finding(code, rule.severity, message, "; ".join(remedies[:SHOWN]) or rule.remedy, node, target))
    return sorted(findings, key=lambda f: (-SEVERITIES.index(f.severity), f.code, f.target))


def _place(hit: Hit) -> str:
    if hit.node and hit.detail:
        return f"'{hit.node}' {hit.detail}"
    return f"'{hit.node}'" if hit.node else hit.detail
