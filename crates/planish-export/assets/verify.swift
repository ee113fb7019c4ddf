// Checks a planish export on this Mac: compiles, loads on each compute unit, counts operators by device, compares logits.
// Run it through verify.sh. Needs macOS 15 and Xcode's command line tools. Written without a Mac: report what fails.

import CoreML
import Foundation

struct Step: Codable { let position: Int; let token: Int; let ids: [Int]; let logits: [Float] }
struct Expected: Codable {
    let layout: String
    let context: Int
    let prefill: Int
    let headRows: Int
    let packages: [String]
    let prompt: [Int]
    let steps: [Step]
}

let folder = URL(fileURLWithPath: CommandLine.arguments[1])
let packages = URL(fileURLWithPath: CommandLine.arguments[2])
let decoder = JSONDecoder()
decoder.keyDecodingStrategy = .convertFromSnakeCase
let expected = try decoder.decode(Expected.self, from: Data(contentsOf: folder.appendingPathComponent("expected.json")))
let host = expected.layout == "monolith/host"
let anemll = expected.layout == "anemll/state"

func array(_ shape: [Int], _ type: MLMultiArrayDataType, _ value: (Int) -> Double) throws -> MLMultiArray {
    let out = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: type)
    for i in 0..<out.count { out[i] = NSNumber(value: value(i)) }
    return out
}

/// The inputs of a call with tokens from `start` on, by name.
func inputs(_ tokens: [Int], _ start: Int, _ cache: MLMultiArray?) throws -> [String: MLMultiArray] {
    let n = tokens.count, columns = expected.context + (host ? n : 0)
    func visible(_ row: Int, _ column: Int) -> Bool {
        if !host { return column <= start + row }
        return column < expected.context ? column < start : column - expected.context <= row
    }
    var out = [
        "input_ids": try array([1, n], .int32) { Double(tokens[$0]) },
        "position_ids": try array([n], .int32) { Double(start + $0) },
        "causal_mask": try array([1, 1, n, columns], .float16) { visible($0 / columns, $0 % columns) ? 0 : -1e4 },
        "current_pos": try array([1], .int32) { _ in Double(start) },
    ]
    if let cache { out["kv_cache"] = cache }
    return out
}

func provider(_ model: MLModel, _ values: [String: MLMultiArray]) throws -> MLFeatureProvider {
    let wanted = model.modelDescription.inputDescriptionsByName.keys
    return try MLDictionaryFeatureProvider(dictionary: values.filter { wanted.contains($0.key) })
}

/// A loaded export: the packages' functions, their state and, for a cache of the caller's, its numbers.
final class Runner {
    var infer: [MLModel] = [], prefill: [MLModel] = []
    var embeddings: MLModel?, head: MLModel?
    var state: MLState?, cache: MLMultiArray?

    init(_ units: MLComputeUnits) throws {
        func load(_ name: String, _ function: String?) throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units
            if let function { configuration.functionName = function }
            let compiled = name.replacingOccurrences(of: ".mlpackage", with: ".mlmodelc")
            return try MLModel(contentsOf: packages.appendingPathComponent(compiled), configuration: configuration)
        }
        for name in expected.packages {
            if name.contains("_embeddings") && anemll { embeddings = try load(name, nil) }
            else if name.contains("_lm_head") && anemll { head = try load(name, nil) }
            else { infer.append(try load(name, "infer")); prefill.append(try load(name, "prefill")) }
        }
        reset()
    }

    func reset() {
        if host {
            let shape = infer[0].modelDescription.inputDescriptionsByName["kv_cache"]!.multiArrayConstraint!.shape
            cache = try! MLMultiArray(shape: shape, dataType: .float16)
            for i in 0..<cache!.count { cache![i] = 0 }
        } else { state = infer[0].makeState() }
    }

    /// All logits of the call's last token, or nil where the layout gives none.
    func call(_ tokens: [Int], _ start: Int, _ valid: Int) throws -> [Float]? {
        var values = try inputs(tokens, start, cache)
        if let embeddings {
            values["hidden_states"] = try embeddings.prediction(from: provider(embeddings, values)).featureValue(for: "hidden_states")!.multiArrayValue!
        }
        var result: MLFeatureProvider?
        for model in tokens.count == 1 ? infer : prefill {
            let features = try provider(model, values)
            result = try state.map { try model.prediction(from: features, using: $0) } ?? model.prediction(from: features)
            if let x = result!.featureValue(for: "output_hidden_states")?.multiArrayValue { values["hidden_states"] = x }
        }
        if let new = result!.featureValue(for: "new_kv")?.multiArrayValue { keep(new, start, valid) }
        if let head {
            if tokens.count > 1 { return nil }
            result = try head.prediction(from: provider(head, values))
        }
        var out: [Float] = []
        var part = 1
        while let logits = result!.featureValue(for: "logits\(part)")?.multiArrayValue {
            let rows = logits.count / expected.headRows
            for i in 0..<expected.headRows { out.append(logits[(rows - 1) * expected.headRows + i].floatValue) }
            part += 1
        }
        return out
    }

    func keep(_ new: MLMultiArray, _ start: Int, _ valid: Int) {
        let s = new.shape.map { $0.intValue }
        for row in 0..<s[0] { for kv in 0..<s[1] { for t in 0..<valid { for i in 0..<s[3] {
            cache![[row, kv, start + t, i] as [NSNumber]] = new[[row, kv, t, i] as [NSNumber]]
        } } } }
    }
}

/// Largest difference from the bundled logits, and how often the three likeliest of one side hold the other's first.
func compare(_ runner: Runner) throws -> [String: Any] {
    runner.reset()
    var prompt = expected.prompt
    let valid = prompt.count
    while prompt.count < expected.prefill { prompt.append(0) }
    _ = try runner.call(prompt, 0, valid)
    var worst: Float = 0, contained = 0
    for step in expected.steps {
        let logits = try runner.call([step.token], step.position, 1)!
        for (id, value) in zip(step.ids, step.logits) {
            let difference = abs(logits[id] - value)
            worst = difference.isNaN ? .infinity : max(worst, difference)
        }
        let best = logits.indices.max { logits[$0] < logits[$1] }!
        if step.ids.prefix(3).contains(best) { contained += 1 }
    }
    // JSON has no infinity, and writing one would end the program.
    return ["max_logit_difference": worst.isFinite ? worst as Any : "not finite" as Any, "top3_contained": contained, "steps": expected.steps.count]
}

@available(macOS 15, *)
func devices(_ units: MLComputeUnits) async throws -> [String: Any] {
    var out: [String: Any] = [:]
    for name in expected.packages {
        let compiled = packages.appendingPathComponent(name.replacingOccurrences(of: ".mlpackage", with: ".mlmodelc"))
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        let plan = try await MLComputePlan.load(contentsOf: compiled, configuration: configuration)
        guard case .program(let program) = plan.modelStructure else { continue }
        for (function, body) in program.functions {
            var counts: [String: Int] = [:]
            var elsewhere: [String: Int] = [:]
            for operation in body.block.operations {
                guard let usage = plan.deviceUsage(for: operation) else { continue }
                var device = "cpu"
                if case .gpu = usage.preferred { device = "gpu" }
                if case .neuralEngine = usage.preferred { device = "neural_engine" }
                counts[device, default: 0] += 1
                if device != "neural_engine" { elsewhere[operation.operatorName, default: 0] += 1 }
            }
            out["\(name) \(function)"] = ["operators": counts, "not_on_neural_engine": elsewhere]
        }
    }
    return out
}

let choices: [(String, MLComputeUnits)] = [
    ("cpu_only", .cpuOnly), ("cpu_and_gpu", .cpuAndGPU), ("cpu_and_neural_engine", .cpuAndNeuralEngine), ("all", .all),
]
var report: [String: Any] = ["macos": ProcessInfo.processInfo.operatingSystemVersionString, "layout": expected.layout]
for (name, units) in choices {
    var entry: [String: Any] = [:]
    do {
        for key in ["first_load_seconds", "second_load_seconds"] {
            let start = Date()
            _ = try Runner(units)
            entry[key] = Date().timeIntervalSince(start)
        }
        let runner = try Runner(units)
        entry["logits"] = try compare(runner)
        entry["devices"] = try await devices(units)
        runner.reset()
        let start = Date()
        for i in 0..<300 { _ = try runner.call([expected.prompt[0]], i % expected.context, 1) }
        entry["tokens_per_second"] = 300 / Date().timeIntervalSince(start)
    } catch { entry["error"] = "\(error)" }
    report[name] = entry
    print("\(name): \(entry)")
}
let json = try JSONSerialization.data(withJSONObject: report, options: [.prettyPrinted, .sortedKeys])
try json.write(to: folder.appendingPathComponent("result.json"))
print("written: \(folder.appendingPathComponent("result.json").path)")
