// What every runtime shares: the package's facts, preprocessing as model/preprocess.json says, and the check against model/cases.
// Add the folder `model` to the app's bundle as a folder reference, and call check() once on a device before you trust its outputs.
import CoreGraphics
import Foundation

struct Port: Decodable { let name: String; let shape: [Int] }

struct Facts: Decodable {
    let file: String, batch: Int, cases: Int, tolerance: Double, inputs: [Port], outputs: [Port]

    static let folder = Bundle.main.url(forResource: "model", withExtension: nil)!
    static func load() throws -> Facts {
        try JSONDecoder().decode(Facts.self, from: Data(contentsOf: folder.appendingPathComponent("model.json")))
    }
    var path: String { Facts.folder.appendingPathComponent(file).path }
}

struct Mismatch: Error { let what: String }

private func floats(_ name: String) throws -> [Float] {
    let data = try Data(contentsOf: Facts.folder.appendingPathComponent("cases/\(name)"))
    return data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }  // little-endian, as every Apple device is
}

/// Runs every case of model/cases; throws when an output is further off than model.json allows, else returns the largest difference.
func check() throws -> Double {
    let facts = try Facts.load()
    let engine = try Engine(facts)
    var worst = 0.0
    for number in 0..<facts.cases {
        var feeds: [String: [Float]] = [:]
        for (i, port) in facts.inputs.enumerated() { feeds[port.name] = try floats("\(number).in.\(i).bin") }
        let found = try engine.infer(feeds)
        for (i, port) in facts.outputs.enumerated() {
            let expected = try floats("\(number).out.\(i).bin")
            guard let got = found[port.name], got.count == expected.count else { throw Mismatch(what: "case \(number): \(port.name) has another size") }
            let largest = max(Double(expected.map(abs).max() ?? 0), 1e-12)
            let gaps = zip(got, expected).map { abs($0 - $1) }
            if gaps.contains(where: { $0.isNaN }) { throw Mismatch(what: "case \(number): \(port.name) holds NaN") }  // max() may pass one by
            let apart = Double(gaps.max() ?? 0) / largest
            if !(apart <= facts.tolerance) { throw Mismatch(what: "case \(number): \(port.name) differs by \(apart), allowed \(facts.tolerance)") }
            worst = max(worst, apart)
        }
    }
    return worst
}

struct Preprocess: Decodable {
    let resize: Int?, crop: Int?, mean: [Float], std: [Float], scale: Float, layout: String, channels: Int, height: Int?, width: Int?
}

/// One picture as the model's input (no batch axis): resized, cropped, (pixel * scale - mean) / std. Core Graphics' filter is not
/// Pillow's, so values differ a little from those the accuracy was measured with.
func preprocess(_ picture: CGImage) throws -> [Float] {
    let how = try JSONDecoder().decode(Preprocess.self, from: Data(contentsOf: Facts.folder.appendingPathComponent("preprocess.json")))
    var (w, h) = (picture.width, picture.height)
    if let short = how.resize { (w, h) = w <= h ? (short, short * h / w) : (short * w / h, short) }
    if how.resize == nil && how.crop == nil { (w, h) = (how.width!, how.height!) }
    let (outWidth, outHeight) = (how.crop ?? w, how.crop ?? h)
    var pixels = [UInt8](repeating: 0, count: outWidth * outHeight * 4)
    let context = CGContext(data: &pixels, width: outWidth, height: outHeight, bitsPerComponent: 8, bytesPerRow: outWidth * 4,
                            space: CGColorSpaceCreateDeviceRGB(), bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)!
    context.interpolationQuality = .high
    context.draw(picture, in: CGRect(x: (outWidth - w) / 2, y: (outHeight - h) / 2, width: w, height: h))
    let area = outWidth * outHeight
    var values = [Float](repeating: 0, count: how.channels * area)
    for at in 0..<area {
        let rgb = (0..<3).map { Float(pixels[at * 4 + $0]) }
        let parts = how.channels == 1 ? [0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]] : rgb  // Pillow's grey: ITU-R 601-2 luma
        for c in 0..<how.channels {
            let (mean, std) = (how.mean[min(c, how.mean.count - 1)], how.std[min(c, how.std.count - 1)])
            values[how.layout == "nchw" ? c * area + at : at * how.channels + c] = (parts[c] * how.scale - mean) / std
        }
    }
    return values
}
