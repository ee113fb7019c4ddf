// What llama.cpp finds likeliest after some prompts, for `cargo xtask parity`.
//
//     node llama_cpp_top.mjs MODEL.gguf PROMPTS.json COUNT
//
// PROMPTS is a list of texts. Prints [{"tokens": [...], "top": [[token, logit], ...]}, ...] and nothing else.
import { readFileSync } from "node:fs";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const [modelPath, promptsPath, count] = process.argv.slice(2);
const prompts = JSON.parse(readFileSync(promptsPath, "utf8"));

const llama = await getLlama({ gpu: false, build: "never", progressLogs: false, logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath, gpuLayers: 0 });
// Keys and values in f32: what is judged is the file, not the rounding of a cache.
const context = await model.createContext({
    contextSize: 256,
    flashAttention: false,
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32",
});
const sequence = context.getSequence();
const found = [];
for (const prompt of prompts) {
    const tokens = [...model.tokenize(prompt)];
    await sequence.clearHistory();
    const last = [tokens.at(-1), { generateNext: { logits: true, options: { temperature: 0 } } }];
    const steps = await sequence.controlledEvaluate([...tokens.slice(0, -1), last]);
    const top = [...steps.at(-1).next.logits.entries()].slice(0, Number(count));
    found.push({ tokens, top });
}
console.log(JSON.stringify(found));
process.exit(0);
