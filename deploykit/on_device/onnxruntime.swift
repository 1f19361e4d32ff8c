// The engine on ONNX Runtime. Swift package https://github.com/microsoft/onnxruntime-swift-package-manager, product onnxruntime, a
// release no older than the one that model.json names.
import Foundation
import OnnxRuntimeBindings

final class Engine {
    private let facts: Facts
    private let session: ORTSession

    init(_ facts: Facts) throws {
        self.facts = facts
        session = try ORTSession(env: ORTEnv(loggingLevel: .warning), modelPath: facts.path, sessionOptions: nil)
    }

    func infer(_ feeds: [String: [Float]]) throws -> [String: [Float]] {
        var inputs: [String: ORTValue] = [:]
        for port in facts.inputs {
            let data = feeds[port.name]!.withUnsafeBufferPointer { NSMutableData(data: Data(buffer: $0)) }
            inputs[port.name] = try ORTValue(tensorData: data, elementType: .float, shape: port.shape.map { NSNumber(value: $0) })
        }
        let found = try session.run(withInputs: inputs, outputNames: Set(facts.outputs.map(\.name)), runOptions: nil)
        return try found.mapValues { value in
            try (value.tensorData() as Data).withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        }
    }
}
