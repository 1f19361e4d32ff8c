// The engine on LiteRT's interpreter for Swift. CocoaPods: pod 'TensorFlowLiteSwift'.
import Foundation
import TensorFlowLite

final class Engine {
    private let facts: Facts
    private let interpreter: Interpreter

    init(_ facts: Facts) throws {
        self.facts = facts
        interpreter = try Interpreter(modelPath: facts.path)
        for (i, port) in facts.inputs.enumerated() { try interpreter.resizeInput(at: i, to: Tensor.Shape(port.shape)) }
        try interpreter.allocateTensors()
    }

    func infer(_ feeds: [String: [Float]]) throws -> [String: [Float]] {
        for (i, port) in facts.inputs.enumerated() {
            try interpreter.copy(feeds[port.name]!.withUnsafeBufferPointer { Data(buffer: $0) }, toInputAt: i)
        }
        try interpreter.invoke()
        var outputs: [String: [Float]] = [:]
        for (i, port) in facts.outputs.enumerated() {
            outputs[port.name] = try interpreter.output(at: i).data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        }
        return outputs
    }
}
