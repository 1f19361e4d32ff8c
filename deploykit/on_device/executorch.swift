// The engine on ExecuTorch. Swift package https://github.com/pytorch/executorch, branch swiftpm-VERSION (the release that
// model.json names), products executorch, backend_xnnpack, kernels_optimized and kernels_quantized; link with -all_load, or the
// backend and the kernels don't register.
import ExecuTorch

final class Engine {
    private let facts: Facts
    private let module: Module

    init(_ facts: Facts) throws {
        self.facts = facts
        module = Module(filePath: facts.path)
        try module.load("forward")
    }

    func infer(_ feeds: [String: [Float]]) throws -> [String: [Float]] {
        let inputs = facts.inputs.map { Tensor<Float>(feeds[$0.name]!, shape: $0.shape) }
        let found = try module.forward(inputs)
        var outputs: [String: [Float]] = [:]
        for (i, port) in facts.outputs.enumerated() {
            let tensor: Tensor<Float> = found[i].tensor()!
            outputs[port.name] = tensor.scalars()
        }
        return outputs
    }
}
